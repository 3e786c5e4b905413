"""How fast a checkpoint is loaded, beside plain reads of the same bytes.

Makes a checkpoint in a temporary folder (or takes one), and reads it in turn in two ways, each in a process of its own:
`moesaic.load`, and a plain read of every file into one buffer of its size, which like the model is kept. Before each
turn the files are dropped from the page cache, or read once so that they are all in it (--cold, --warm), alike for
both. Prints the ratio of the best times, and how far peak memory goes beyond the model's own bytes.

    python benchmarks/load_speed.py [--size 8GB] [--folder CHECKPOINT] [--cold] [--turns 3]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from moesaic import families
from moesaic.cli.convert import parse_size
from moesaic.hub import save
from moesaic.models.decoder import Decoder

WANTED = 0.8  # of the speed of plain reads
PEAK = """
import sys, time, os
from pathlib import Path
import torch
def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024
"""
PLAIN = """
before, start = status("VmRSS"), time.perf_counter()
kept = []
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    kept.append(torch.empty(path.stat().st_size, dtype=torch.uint8))
    rest = kept[-1].numpy().data
    with path.open("rb", buffering=0) as file:
        while rest:
            rest = rest[file.readinto(rest):]
print(time.perf_counter() - start, status("VmHWM") - before)
"""
LOAD = """
from moesaic.hub.loading import load
before, start = status("VmRSS"), time.perf_counter()
model = load(sys.argv[1])
print(time.perf_counter() - start, status("VmHWM") - before)
"""


def make(folder: Path, num_bytes: int) -> None:
    """A Qwen3-MoE checkpoint of about so many bytes in bf16, a tensor per expert as released ones have them."""
    raw = {
        "model_type": "qwen3_moe", "vocab_size": 32000, "hidden_size": 2048, "moe_intermediate_size": 768,
        "head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 4, "num_experts": 32,
        "num_experts_per_tok": 4, "num_hidden_layers": 1, "max_position_embeddings": 4096,
    }  # fmt: skip
    one, two = (families.from_hf(raw | {"num_hidden_layers": count}).total for count in (1, 2))
    raw["num_hidden_layers"] = max(1, round((num_bytes / 2 - one) / (two - one)) + 1)
    model = Decoder(families.from_hf(raw), dtype=torch.bfloat16)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(0.5)  # pages of memory that are not all one page of zeros
    save(model, folder)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(folder: Path) -> None:
    """Read a folder's files once, so that they are in the page cache as far as it reaches."""
    buffer = memoryview(bytearray(2**24))
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def turn(code: str, folder: Path) -> tuple[float, int]:
    """Seconds and the growth of peak memory."""
    done = subprocess.run([sys.executable, "-c", PEAK + code, str(folder)], capture_output=True, text=True, check=True)
    seconds, grown = done.stdout.split()
    return float(seconds), int(grown)


def measure(folder: Path, turns: int, is_cold: bool) -> dict[str, Any]:
    """Both ways in turn, so that what else the machine does meets both."""
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    times: dict[str, list[float]] = {"plain": [], "load": []}
    grown = {"plain": 0, "load": 0}
    for _ in range(turns):
        for name, code in (("plain", PLAIN), ("load", LOAD)):
            (forget if is_cold else remember)(folder)
            seconds, grown[name] = turn(code, folder)
            times[name].append(seconds)
    best = {name: min(each) for name, each in times.items()}
    return {
        "bytes": num_bytes,
        "page_cache": "cold" if is_cold else "warm",
        "plain_s": times["plain"],
        "load_s": times["load"],
        "plain_bytes_per_s": num_bytes / best["plain"],
        "load_bytes_per_s": num_bytes / best["load"],
        "speed_ratio": best["plain"] / best["load"],
        "peak_beyond_model_bytes": grown["load"] - num_bytes,
        "peak_beyond_files_bytes_of_plain_reads": grown["plain"] - num_bytes,
    }


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With the options of what is read, and how often."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="8GB", help="of the checkpoint that is made (%(default)s)")
    parser.add_argument("--folder", type=Path, help="measure this checkpoint instead")
    parser.add_argument("--cold", action="store_true", help="with files that are not in the page cache")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    return parser


def made_or_given(args: argparse.Namespace, scratch: Path) -> Path:
    """The checkpoint's folder."""
    if args.folder is None:
        make(scratch / "model", parse_size(args.size))
    return args.folder or scratch / "model"


def main() -> None:
    """Make a checkpoint, or take one, read it in turns, and print the ratio."""
    args = parser_of(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(made_or_given(args, Path(scratch)), args.turns, args.cold)
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['bytes'] / 1e9:.2f} GB, page cache {result['page_cache']}")
    print(f"plain reads {result['plain_bytes_per_s'] / 1e9:.2f} GB/s, load {result['load_bytes_per_s'] / 1e9:.2f} GB/s")
    enough = "enough" if result["speed_ratio"] >= WANTED else "too slow"
    print(f"ratio {result['speed_ratio']:.3f} ({enough}: {WANTED} is wanted)")
    print(f"peak memory beyond the model's bytes: {result['peak_beyond_model_bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
