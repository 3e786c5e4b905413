"""The ancestors of today's MoE on real data, each with its paper's claim as the check.

    python benchmarks/ancestors.py [--only 1991 1994 2017] [--seeds 5] [--corpus FOLDER] [--json]

1991  adaptive mixtures of local experts: images of handwritten digits, odd or even. The three objectives, one net of
      equal size, and an ensemble of the same networks.
1994  hierarchical mixtures with EM: the standard error of a tumour's area from ten other measurements. EM against
      gradient ascent from the same start, counted in sweeps through the cases.
2017  the LSTM with a sparsely-gated layer: the next byte of text in many domains. Against a dense layer of equal active
      parameters, and with and without the balance losses.

The first two need scikit-learn, which brings their data (pip install scikit-learn). The third reads the first megabyte
of every domain of --corpus (default: the embedded corpus). In the first two, every method has the learning rate that
suits it best out of the same few. A claim that was not found again is printed as such. About 5 minutes on one core.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ancestor_parts import hierarchy, local_experts, sparse_lstm
from ancestor_parts.common import Part, Row

from moesaic.errors import MoesaicError

PARTS: dict[str, Callable[[int, Path | None], Part]] = {
    "1991": local_experts.part,
    "1994": hierarchy.part,
    "2017": sparse_lstm.part,
}


def show(name: str, part: Part) -> None:
    print(f"\n{name}  {part.task}")
    for title, rows in part.tables.items():
        print(f"\n  {title}")
        for line in table(rows):
            print(f"  {line}")
    print()
    for claim in part.claims:
        print(f"  {'found' if claim.is_found else 'NOT FOUND'}: {claim.text} ({claim.figures})")


def table(rows: list[Row]) -> list[str]:
    """Lines of text, the first column to the left, all others to the right."""
    heads = list(functools.reduce(lambda known, row: known | row, rows))
    cells = [heads, *([cell(row.get(head, math.nan)) for head in heads] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        right = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *right]))
    return lines


def cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else "never" if math.isinf(value) else f"{value:.4g}"


def to_json(value: Any) -> Any:
    """A tree for JSON, which has no infinities: what was never reached, or is not there, is null."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """Run the parts that were asked for and print their tables, or one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=5, help=f"2017 takes {sparse_lstm.MOST_SEEDS} at most")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}; give 1 or more")
    torch.set_num_threads(1)  # the parts are too small to share out
    try:
        parts = {name: PARTS[name](args.seeds, args.corpus) for name in args.only}
    except MoesaicError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if args.json:
        print(json.dumps(to_json(parts), indent=2))
        return
    for name, part in parts.items():
        show(name, part)


if __name__ == "__main__":
    main()
