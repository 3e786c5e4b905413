"""Compiled kernels against plain ones: microseconds an operation, and a whole MoE layer's forward.

    python benchmarks/native_kernels.py [--threads 2] [--rounds 15] [--rows]

The two are timed in turns, so that whatever else the machine does falls on both; medians are printed.
`--rows` instead finds how many rows an expert may have before torch.mm beats reading the weights in strips.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.kernels import native, reference


class Shape(NamedTuple):
    """A layer: hidden and expert sizes, experts, choices, dtype, and the tokens that meet it."""

    name: str
    hidden: int
    inner: int
    num_experts: int
    top_k: int
    dtype: torch.dtype
    num_tokens: int


SHAPES = [
    Shape("small, decode", 256, 256, 32, 4, torch.float32, 1),
    Shape("small, 512 tokens", 256, 256, 32, 4, torch.float32, 512),
    Shape("7B-A1B, decode", 2048, 1024, 64, 8, torch.bfloat16, 1),
    Shape("7B-A1B, decode of 8", 2048, 1024, 64, 8, torch.bfloat16, 8),
    Shape("7B-A1B, 512 tokens", 2048, 1024, 64, 8, torch.bfloat16, 512),
]


def median_us(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median microseconds of each call, the calls taking turns; a turn lasts about 10 ms."""
    repeats = []
    for call in calls:
        start = time.perf_counter()
        call()
        repeats.append(max(1, min(300, int(0.01 / (time.perf_counter() - start)))))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, repeat, seen in zip(calls, repeats, times, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            seen.append((time.perf_counter() - start) / repeat * 1e6)
    return [statistics.median(seen) for seen in times]


class Layer:
    """The inputs of every operation of one MoE layer."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(0)

        def rand(*size: int) -> Tensor:
            return (torch.randn(*size, generator=generator) / size[-1] ** 0.5).to(shape.dtype)

        self.gate_up = rand(shape.num_experts, 2 * shape.inner, shape.hidden)
        self.down = rand(shape.num_experts, shape.hidden, shape.inner)
        self.x_TD = rand(shape.num_tokens, shape.hidden)
        self.scores_TE = torch.rand(shape.num_tokens, shape.num_experts, generator=generator)

    def steps(self, kernels: ModuleType) -> dict[str, Callable[[], Tensor]]:
        """Each operation as a call without arguments, its inputs computed by the same kernels."""
        ids_TK = kernels.select_topk(self.scores_TE, self.shape.top_k)
        token_ids_R, choice_R, offsets = kernels.sort_rows(ids_TK, self.shape.num_experts)
        weights_R = self.scores_TE[token_ids_R, ids_TK[token_ids_R, choice_R]]
        row_ids_R = torch.argsort(token_ids_R * self.shape.top_k + choice_R)
        token_offsets = torch.arange(self.shape.num_tokens + 1) * self.shape.top_k
        x_RD = kernels.gather_rows(self.x_TD, token_ids_R)
        gate_up_RF = kernels.grouped_linear(x_RD, self.gate_up, offsets)
        h_RF = kernels.silu_mul(gate_up_RF)
        out_RD = kernels.grouped_linear(h_RF, self.down, offsets)
        return {
            "select_topk": lambda: kernels.select_topk(self.scores_TE, self.shape.top_k),
            "sort_rows": lambda: kernels.sort_rows(ids_TK, self.shape.num_experts)[0],
            "gather_rows": lambda: kernels.gather_rows(self.x_TD, token_ids_R),
            "grouped_linear gate_up": lambda: kernels.grouped_linear(x_RD, self.gate_up, offsets),
            "silu_mul": lambda: kernels.silu_mul(gate_up_RF),
            "grouped_linear down": lambda: kernels.grouped_linear(h_RF, self.down, offsets),
            "combine_rows": lambda: kernels.combine_rows(out_RD, weights_R, row_ids_R, token_offsets),
            "combine_rows_grad": lambda: kernels.combine_rows_grad(self.x_TD, out_RD, weights_R, token_ids_R)[0],
            "silu_mul_grad": lambda: kernels.silu_mul_grad(h_RF, gate_up_RF),
        }


def forward(layer: Layer, kernels: ModuleType) -> Tensor:
    """What one token pays in this layer, from the router's scores on."""
    ids_TK = kernels.select_topk(layer.scores_TE, layer.shape.top_k)
    token_ids_R, choice_R, offsets = kernels.sort_rows(ids_TK, layer.shape.num_experts)
    weights_R = layer.scores_TE[token_ids_R, ids_TK[token_ids_R, choice_R]]
    row_ids_R = torch.argsort(token_ids_R * layer.shape.top_k + choice_R)
    token_offsets = torch.arange(layer.shape.num_tokens + 1) * layer.shape.top_k
    x_RD = kernels.gather_rows(layer.x_TD, token_ids_R)
    h_RF = kernels.silu_mul(kernels.grouped_linear(x_RD, layer.gate_up, offsets))
    out_RD = kernels.grouped_linear(h_RF, layer.down, offsets)
    return kernels.combine_rows(out_RD, weights_R, row_ids_R, token_offsets)


def compare(shape: Shape, rounds: int) -> None:
    """One table: each operation, then the whole forward."""
    layer = Layer(shape)
    native_steps, reference_steps = layer.steps(native), layer.steps(reference)
    print(f"\n{shape.name}: {shape}")
    print(f"{'operation':26}{'native us':>12}{'reference us':>14}{'ratio':>8}")
    pairs = {name: [native_steps[name], reference_steps[name]] for name in native_steps}
    pairs["forward of the layer"] = [partial(forward, layer, native), partial(forward, layer, reference)]
    for name, calls in pairs.items():
        ours, plain = median_us(calls, rounds)
        print(f"{name:26}{ours:12.1f}{plain:14.1f}{plain / ours:8.2f}")


def scan_rows(rounds: int) -> None:
    """grouped_linear with every row in strips, against torch.mm for every expert, over rows an expert."""
    few = dict(native._FEW_ROWS)
    for dtype, num_experts, inputs, outputs in (
        (torch.float32, 8, 512, 1024),
        (torch.float32, 8, 2048, 2048),
        (torch.bfloat16, 8, 512, 1024),
        (torch.bfloat16, 8, 2048, 2048),
    ):
        weight_EOI = torch.randn(num_experts, outputs, inputs).to(dtype)
        print(f"\n{dtype}, {num_experts} experts, {inputs} to {outputs}")
        print(f"{'rows':>5}{'strips us':>12}{'torch.mm us':>14}")
        for rows in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
            x_RI = torch.randn(rows * num_experts, inputs).to(dtype)
            offsets = torch.arange(num_experts + 1) * rows
            native._FEW_ROWS[dtype] = rows
            calls = [partial(k.grouped_linear, x_RI, weight_EOI, offsets) for k in (native, reference)]
            strips, library = median_us(calls, rounds)
            print(f"{rows:5}{strips:12.1f}{library:14.1f}")
    native._FEW_ROWS.update(few)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiled kernels against plain ones.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", action="store_true", help="scan rows an expert for the threshold of grouped_linear")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    print(f"kernels: {native.describe()}; torch {torch.__version__}")
    if options.rows:
        scan_rows(options.rounds)
        return
    for shape in SHAPES:
        compare(shape, options.rounds)


if __name__ == "__main__":
    main()
