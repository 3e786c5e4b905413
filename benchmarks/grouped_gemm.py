"""Forward and backward of a layer's experts: grouped products here, torch's grouped_mm, one dense product of that work.

    python benchmarks/grouped_gemm.py [--threads 2] [--rounds 9] [--rows 8 64 512] [--dtype float32 bfloat16] [--json]
    python benchmarks/grouped_gemm.py --classes

Experts of two layers: T (hidden 384, inner 512, 16 experts) and A (hidden 1024, inner 512, 32 experts), rows spread
over them at random. `grouped_mm` is what transformers runs on a CPU; `dense` sends as many rows through one pair of
matrices, so that its weights stay in cache. Ours sums the weights' gradients in fp32 buffers, as the trainer does;
`--autograd` has them returned as fresh tensors, as the other two do. All take turns, so that whatever else the machine
does falls on each; medians of GFLOP/s are printed, and ratios to dense within the same turns.

`--classes` instead times each product against torch.mm for every expert, in more layers and over rows an expert: the
source of the size classes in kernels/native.py. dW goes into new memory, whose pages cost both more than the product
where it is large, and into memory that is kept, as the trainer does.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  its common name
from torch import Tensor, nn

from moesaic.kernels import native, ops, reference


class Layer(NamedTuple):
    name: str
    hidden: int
    inner: int
    num_experts: int


LAYERS = [Layer("T", 384, 512, 16), Layer("A", 1024, 512, 32)]
MORE_LAYERS = [Layer("S", 256, 128, 64), Layer("M", 512, 1024, 16), Layer("Q", 2048, 768, 8)]  # for the size classes
Call = Callable[[], object]


def seconds_in_turns(calls: dict[str, Call], rounds: int, turn_s: float) -> dict[str, list[float]]:
    """Seconds of each call in each round; a turn lasts about `turn_s`."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(turn_s / (time.perf_counter() - start)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return seconds


def offsets_of(num_experts: int, rows_per_expert: int) -> Tensor:
    """Rows spread over experts at random, with a fixed seed. int64 [E+1]."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(num_experts, (num_experts * rows_per_expert,), generator=generator)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64)
    offsets[1:] = chosen.bincount(minlength=num_experts).cumsum(0)
    return offsets


def gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def feed_forwards(layer: Layer, rows_per_expert: int, dtype: torch.dtype, autograd: bool) -> dict[str, Call]:
    """Forward and backward of each implementation, as calls without arguments."""
    offsets = offsets_of(layer.num_experts, rows_per_expert)
    ends = offsets[1:].to(torch.int32)
    rows = int(offsets[-1])

    def weight(*shape: int) -> Any:
        return nn.Parameter((0.02 * torch.randn(shape)).to(dtype))

    gate_up, down = (
        weight(layer.num_experts, 2 * layer.inner, layer.hidden),
        weight(layer.num_experts, layer.hidden, layer.inner),
    )
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in (gate_up, down)]
    dense = [weight(2 * layer.inner, layer.hidden), weight(layer.hidden, layer.inner)]
    if not autograd:
        for parameter in (gate_up, down):
            parameter.grad_buffer = torch.zeros(parameter.shape)
            parameter.grad_buffer_fresh = True
    x_RD, dy_RD = torch.randn(rows, layer.hidden).to(dtype), torch.randn(rows, layer.hidden).to(dtype)

    def ours(x: Tensor) -> Tensor:
        return ops.grouped_linear(ops.grouped_gated(x, gate_up, offsets), down, offsets)

    def grouped_mm(x: Tensor) -> Tensor:
        inner = gated(F.grouped_mm(x, theirs[0].transpose(1, 2), offs=ends))
        return F.grouped_mm(inner, theirs[1].transpose(1, 2), offs=ends)

    def one_dense(x: Tensor) -> Tensor:
        return F.linear(gated(F.linear(x, dense[0])), dense[1])

    def both_ways(forward: Callable[[Tensor], Tensor]) -> None:
        forward(x_RD.detach().requires_grad_()).backward(dy_RD)
        for parameter in (gate_up, down, *theirs, *dense):
            parameter.grad = None
        if not autograd:
            gate_up.grad_buffer_fresh = down.grad_buffer_fresh = True

    return {f.__name__: lambda f=f: both_ways(f) for f in (ours, grouped_mm, one_dense)}


def compare(args: argparse.Namespace) -> None:
    """One line a layer, dtype and number of rows: GFLOP/s of each, and the ratio of ours to dense."""
    for layer in LAYERS:
        for dtype in args.dtype:
            for rows in args.rows:
                calls = feed_forwards(layer, rows, getattr(torch, dtype), args.autograd)
                seconds = seconds_in_turns(calls, args.rounds, args.turn)
                work = 18 * rows * layer.num_experts * layer.hidden * layer.inner
                speeds = {name: work / statistics.median(spent) / 1e9 for name, spent in seconds.items()}
                to_dense = {
                    name: statistics.median(d / s for d, s in zip(seconds["one_dense"], spent, strict=True))
                    for name, spent in seconds.items()
                }
                report(args, layer, dtype, rows, speeds, to_dense)


def report(
    args: argparse.Namespace, layer: Layer, dtype: str, rows: int, speeds: dict[str, float], to_dense: dict[str, float]
) -> None:
    if args.json:
        line = {"layer": layer.name, "dtype": dtype, "rows_per_expert": rows, "gflops": speeds, "to_dense": to_dense}
        print(json.dumps(line), flush=True)
        return
    texts = [f"{name} {speeds[name]:6.1f} GFLOP/s ({to_dense[name]:4.2f} of dense)" for name in ("ours", "grouped_mm")]
    dense = f"dense {speeds['one_dense']:6.1f}"
    print(f"{layer.name} {dtype:9}{rows:4} rows  " + "  ".join(texts) + f"  {dense}", flush=True)


def scan_classes(args: argparse.Namespace) -> None:
    """Each product here and by torch.mm for every expert, over rows an expert: how many times as fast ours is."""
    for dtype in (getattr(torch, name) for name in args.dtype):
        print(f"\n{native.describe()}; {dtype}: times as fast as torch.mm")
        print(f"{'layer':7}{'rows':>5}{'forward':>9}{'dX':>7}{'dW, new':>9}{'dW, kept':>10}")
        for layer in LAYERS + MORE_LAYERS:
            for rows in args.rows:
                offsets = offsets_of(layer.num_experts, rows)
                num_rows, inputs, outputs = int(offsets[-1]), layer.hidden, 2 * layer.inner
                x_RI, dy_RO = torch.randn(num_rows, inputs).to(dtype), torch.randn(num_rows, outputs).to(dtype)
                weight_EOI = torch.randn(layer.num_experts, outputs, inputs).to(dtype)
                ratios = []
                for name, inputs_of in (
                    ("grouped_linear", (x_RI, weight_EOI, offsets)),
                    ("grouped_linear_input_grad", (dy_RO, weight_EOI, offsets)),
                    ("grouped_linear_weight_grad", (dy_RO, x_RI, offsets)),
                ):
                    calls: dict[str, Call] = {
                        k.__name__: lambda k=k, name=name, of=inputs_of: getattr(k, name)(*of)
                        for k in (native, reference)
                    }
                    spent = seconds_in_turns(calls, args.rounds, args.turn)
                    ours, library = (statistics.median(spent[k.__name__]) for k in (native, reference))
                    ratios.append(library / ours)
                ratios.append(kept_ratio(args, dy_RO, x_RI, offsets))
                forward, d_input, new, kept = ratios
                print(f"{layer.name:7}{rows:5}{forward:9.2f}{d_input:7.2f}{new:9.2f}{kept:10.2f}", flush=True)


def kept_ratio(args: argparse.Namespace, dy_RO: Tensor, x_RI: Tensor, offsets: Tensor) -> float:
    """How many times as fast ours writes the weights' gradients into fp32 memory that is kept, as the trainer does.

    torch.mm is compared in fp32, the only dtype in which it can write there.
    """
    kept_EOI = torch.zeros(len(offsets) - 1, dy_RO.shape[1], x_RI.shape[1])
    spans = list(enumerate(pairwise(offsets.tolist())))
    dy, x = dy_RO.float(), x_RI.float()

    def library() -> None:
        for expert, (start, end) in spans:
            torch.mm(dy[start:end].T, x[start:end], out=kept_EOI[expert])

    def ours() -> None:
        native.add_grouped_linear_weight_grad(dy_RO, x_RI, offsets, kept_EOI, accumulate=False)

    spent = seconds_in_turns({"ours": ours, "library": library}, args.rounds, args.turn)
    return statistics.median(spent["library"]) / statistics.median(spent["ours"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--turn", type=float, default=0.06, help="seconds of one implementation's turn")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 512], help="rows an expert, on average")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--autograd", action="store_true", help="our weights' gradients as fresh tensors, too")
    parser.add_argument("--classes", action="store_true", help="each product against torch.mm, by rows an expert")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.classes:
        native._LIBRARY_ROWS.clear()
        native._LIBRARY_GRAD_ROWS.clear()
        scan_classes(args)
        return
    if not args.json:
        print(f"kernels: {native.describe()}; torch {torch.__version__}; forward + backward")
    compare(args)


if __name__ == "__main__":
    main()
