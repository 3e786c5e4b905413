"""Packed experts alone: multiply-adds a second, and what that is of the machine's products and of its memory.

    python benchmarks/packed_experts.py --format int4/32 --experts 64 --hidden 2048 --inner 768 [--isa avx512_vnni]
        [--rows 1 8 64 512] [--threads 2] [--rounds 7] [--json]

Every expert gets as many rows, each of another token. A probe of each kind runs between any two measurements, so that
whatever else the machine does falls on all: torch._int_mm of 2048^3 (the peak of eight-bit products) and a sum over 512
MB (the bandwidth of reading). Medians of the rounds are printed, and of the ratios within a round. `bound` is the
larger of the two shares: 1 says that products or memory could be no faster. Experts of less than the caches hold are
read from there; take enough of them (1 GB) to see memory.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.kernels import native
from moesaic.kernels.blocks import ExpertRows, PackedExperts, PackedMatrices, PackedShape


class Case(NamedTuple):
    experts: PackedExperts
    x_TD: Tensor
    rows: ExpertRows
    multiply_adds: int
    weight_bytes: int


def matrices(kind: str, num_experts: int, outputs: int, inputs: int, *, paired: bool) -> PackedMatrices:
    """Packed bytes at random whose scales are normal numbers (of floats: zeros), which take as long as real ones.

    As codes of FP8 none of them is below the normal numbers, which are rare among weights.
    """
    name, _, group = kind.partition("/")
    shape = PackedShape(format=name, outputs=outputs, inputs=inputs, group=int(group or 32), paired=paired)  # pyright: ignore[reportArgumentType]
    count = native._native.packed_bytes(shape.format, outputs, inputs, shape.group, paired)
    if name in ("fp32", "bf16"):
        return PackedMatrices(torch.zeros(num_experts, count, dtype=torch.uint8), shape)
    return PackedMatrices(torch.randint(0x29, 0x30, (num_experts, count), dtype=torch.uint8), shape)


def case(kind: str, num_experts: int, hidden: int, inner: int, rows_per_expert: int) -> Case:
    """Random experts of a format, and as many tokens that each go to one of them, evenly."""
    into = matrices(kind, num_experts, 2 * inner, hidden, paired=True)
    down = matrices(kind, num_experts, hidden, inner, paired=False)
    tokens = num_experts * rows_per_expert
    offsets = torch.arange(num_experts + 1) * rows_per_expert
    rows = ExpertRows(offsets, torch.ones(tokens), torch.randperm(tokens)[:, None])
    return Case(
        PackedExperts(into, down, "silu"),
        torch.randn(tokens, hidden),
        rows,
        3 * tokens * hidden * inner,
        into.data.nbytes + down.data.nbytes,
    )


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measured(chosen: Case, rounds: int) -> dict[str, float]:
    """Medians over rounds, ours in turn with torch's int8 product and a read of memory."""
    out_TD = torch.zeros_like(chosen.x_TD)
    a, b = (torch.randint(-128, 127, (2048, 2048), dtype=torch.int8) for _ in range(2))
    probe = torch.zeros(128 << 20)
    own = lambda: native.packed_experts(chosen.x_TD, chosen.experts, chosen.rows, out_TD)  # noqa: E731
    own()
    repeats = max(1, int(0.1 / seconds(own)))
    figures: dict[str, list[float]] = {"gmac_s": [], "of_int8_peak": [], "of_bandwidth": [], "bound": []}
    for _ in range(rounds):
        peak = 2048**3 / min(seconds(lambda: torch._int_mm(a, b)) for _ in range(3))  # pyright: ignore[reportPrivateImportUsage]  not exported
        bandwidth = probe.nbytes / min(seconds(probe.sum) for _ in range(3))
        own_s = min(seconds(own) for _ in range(repeats))
        of_peak = chosen.multiply_adds / own_s / peak
        of_bandwidth = chosen.weight_bytes / own_s / bandwidth
        for name, value in zip(
            figures,
            (chosen.multiply_adds / own_s / 1e9, of_peak, of_bandwidth, max(of_peak, of_bandwidth)),
            strict=True,
        ):
            figures[name].append(value)
    return {name: round(statistics.median(values), 3) for name, values in figures.items()}


def main() -> None:
    """Measure every number of rows an expert, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="int4/32", help="fp32, bf16, fp8, mxfp4, int8/GROUP, int4/GROUP")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isa", help="a lower instruction set than the best")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.isa and not native._native.use_isa(options.isa):
        parser.error(f"--isa {options.isa}: use one of {', '.join(native._native.available_isas())}")
    for rows in options.rows:
        chosen = case(options.format, options.experts, options.hidden, options.inner, rows)
        told = {"isa": native._native.isa(), "format": options.format, "rows": rows, **measured(chosen, options.rounds)}
        print(json.dumps(told) if options.json else "  ".join(f"{name} {value}" for name, value in told.items()))


if __name__ == "__main__":
    main()
