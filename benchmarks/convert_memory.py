"""How much memory `moesaic convert` takes for a checkpoint of tensors that are larger than that.

Makes a Mixtral with stacked experts (at 16 GB: 3.2 GB a tensor) in a temporary folder, as a sparse file of zeros, and
converts it to a tensor per expert and back, each in a process of its own. Prints the peak memory of both, torch
included, and what of it goes beyond a process that only imports what is needed.

    python benchmarks/convert_memory.py [--size 16GB] [--dtype fp8]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moesaic import families
from moesaic.cli.convert import parse_size
from moesaic.config import ModelConfig
from moesaic.hub.layouts import in_layout
from moesaic.hub.safetensors_header import ITEM_BYTES, header_bytes
from moesaic.models.weight_map import file_shapes

MOST = 1_000_000_000
CONVERT = """
import sys
from moesaic.hub.streaming import convert
import torch
def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024
before = status("VmRSS")
convert(sys.argv[1], sys.argv[2], layout=sys.argv[3], dtype=sys.argv[4] or None)
print(status("VmHWM"), before)
"""


def config_of(num_bytes: int) -> ModelConfig:
    """Three layers of eight experts, whose width makes up the size in bf16."""
    raw = {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 6144, "num_hidden_layers": 3,
        "num_attention_heads": 48, "num_key_value_heads": 8, "max_position_embeddings": 4096, "num_local_experts": 8,
    }  # fmt: skip
    narrow, wide = (families.from_hf(raw | {"intermediate_size": width}).total for width in (128, 256))
    width = 128 * round((num_bytes / 2 - narrow) / (wide - narrow) + 1)
    return families.from_hf(raw | {"intermediate_size": max(128, width)})


def make(folder: Path, config: ModelConfig) -> int:
    """The checkpoint, with experts stacked, in a file with holes. Returns the bytes of its largest tensor."""
    weight_map = in_layout(config, families.family(config.family).weight_map(config), "fused")
    tensors = {name: ("BF16", shape) for name, shape in file_shapes(config.tensors(), weight_map).items()}
    header = header_bytes(tensors)
    sizes = [ITEM_BYTES[dtype] * _product(shape) for dtype, shape in tensors.values()]
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(sizes))
    (folder / "config.json").write_text(json.dumps(families.to_hf(config)), encoding="utf-8")
    return max(sizes)


def _product(shape: tuple[int, ...]) -> int:
    return shape[0] * _product(shape[1:]) if shape else 1


def turn(source: Path, folder: Path, layout: str, dtype: str) -> dict[str, Any]:
    """One conversion in a process of its own."""
    started = time.perf_counter()
    command = [sys.executable, "-c", CONVERT, str(source), str(folder), layout, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, before = (int(each) for each in done.stdout.split())
    return {
        "to": f"{layout} {dtype}".strip(),
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak,
        "peak_beyond_imports_bytes": peak - before,
    }


def main() -> None:
    """Make a checkpoint, convert it there and back, and print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="16GB", help="of the checkpoint that is made (%(default)s)")
    parser.add_argument("--dtype", default="", help="of the files with a tensor per expert (bf16, as made)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        fused, single, back = (Path(scratch) / name for name in ("fused", "single", "back"))
        config = config_of(parse_size(args.size))
        largest = make(fused, config)
        turns = [
            turn(fused, single, "per-expert", args.dtype),
            turn(single, back, "fused", "bf16" if args.dtype else ""),
        ]
    result = {"bytes": 2 * config.total, "largest_tensor_bytes": largest, "turns": turns}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['bytes'] / 1e9:.1f} GB, largest tensor {largest / 1e9:.2f} GB")
    for each in turns:
        verdict = "enough" if each["peak_bytes"] < MOST else f"too much: {MOST / 1e9:.0f} GB is wanted"
        print(
            f"to {each['to']}: peak memory {each['peak_bytes'] / 1e6:.0f} MB ({verdict}), "
            f"{each['peak_beyond_imports_bytes'] / 1e6:.0f} MB beyond imports, {each['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
