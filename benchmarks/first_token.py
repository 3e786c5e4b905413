"""How long a checkpoint takes to its first token in the engine, beside plain reads of the same bytes.

Each turn is a process of its own, timed after its imports: a plain read of every file into one buffer of its size; the
engine, from the files to the first token; the same, keeping what it packed; and from what was kept. Before each turn
the files are dropped from the page cache, or read once so that they are in it (--cold, --warm is the default).

    python benchmarks/first_token.py [--size 8GB] [--folder CHECKPOINT] [--bits 4] [--cold] [--turns 3]
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from load_speed import PLAIN, forget, made_or_given, parser_of, remember, turn

WANTED_RATIO, WANTED_SECOND_START = 1.2, 3.0
ENGINE = """
from moesaic.engine.engine import Engine
bits = {bits}
before, start = status("VmRSS"), time.perf_counter()
engine = Engine(sys.argv[1], bits=bits, packed_file={packed_file})
engine.generate([1, 2, 3, 4, 5, 6, 7, 8], 1)
print(time.perf_counter() - start, status("VmHWM") - before)
"""


def measure(folder: Path, bits: int | None, turns: int, is_cold: bool, scratch: Path) -> dict[str, Any]:
    """Best seconds of each way, taken in turns; the engine's growth of memory."""
    packed = scratch / "packed"
    ways = {
        "plain": PLAIN,
        "first token": ENGINE.format(bits=bits, packed_file=None),
        "first token, keeping": ENGINE.format(bits=bits, packed_file=repr(str(packed))),
        "second start": ENGINE.format(bits=bits, packed_file=repr(str(packed))),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    grown: dict[str, int] = {}
    for _ in range(turns):
        packed.unlink(missing_ok=True)
        for way, code in ways.items():
            if way != "second start":
                (forget if is_cold else remember)(folder)
            taken, grown[way] = turn(code, folder)
            seconds[way].append(taken)
    best = {way: min(each) for way, each in seconds.items()}
    return {
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "bits": bits,
        "page_cache": "cold" if is_cold else "warm",
        "seconds": seconds,
        "ratio": best["first token"] / best["plain"],
        "second_start_s": best["second start"],
        "peak_bytes": grown,
    }


def main() -> None:
    """Make a checkpoint, or take one, and print each way's seconds."""
    parser = parser_of(__doc__)
    parser.add_argument("--bits", type=int, choices=(8, 4), help="pack in so many (as the files are)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = made_or_given(args, Path(scratch))
        result = measure(folder, args.bits, args.turns, args.cold, Path(scratch))
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['bytes'] / 1e9:.2f} GB, page cache {result['page_cache']}, {args.bits or 'their own'} bits")
    for way, each in result["seconds"].items():
        print(f"{way:22}{', '.join(f'{taken:.2f}' for taken in each)} s, {result['peak_bytes'][way] / 1e9:.2f} GB")
    print(f"to the first token in {result['ratio']:.2f} of a plain read ({WANTED_RATIO} or less is wanted)")
    print(f"the second start in {result['second_start_s']:.2f} s ({WANTED_SECOND_START:g} or less is wanted)")


if __name__ == "__main__":
    main()
