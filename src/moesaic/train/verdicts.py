"""What a comparison says, sentence by sentence: computed from the run, never written down beforehand."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from moesaic.telemetry.health import RouterHealth
from moesaic.telemetry.load import StepLoad, sum_loads
from moesaic.telemetry.report_data import ModelResult, Verdict
from moesaic.train.compare import Outcome

Axis = Literal["tokens", "flops", "seconds"]


def bits_per_byte_at(result: ModelResult, axis: Axis, value: float) -> float:
    """The held-out curve at a number of tokens, FLOPs or seconds, linear between evaluations; NaN outside of it."""
    points = [(float(getattr(point, axis)), point.bits_per_byte) for point in result.held_out]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= value <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (value - x0) / (x1 - x0)
    return math.nan


def verdicts(moe: Outcome, active: ModelResult, total: ModelResult, last_steps: int = 20) -> tuple[Verdict, ...]:
    """What the run says, sentence by sentence."""
    ours = moe.result
    return (
        _at_equal("tokens", "tokens", ours, active, lambda x: f"{x / 1e6:.2f}M"),
        _at_equal("flops", "training compute", ours, active, lambda x: f"{x / 1e12:.1f} TFLOP"),
        _at_equal("seconds", "wall-clock", ours, active, lambda x: f"{x:.0f} s"),
        _between(ours, active, total),
        _domains(ours, active),
        _price(ours, active),
        _router(moe.loads[-last_steps:]),
    )


def _at_equal(axis: Axis, words: str, moe: ModelResult, dense: ModelResult, show: Callable[[float], str]) -> Verdict:
    """Both curves at the largest amount that both have spent."""
    value = min(float(getattr(moe.held_out[-1], axis)), float(getattr(dense.held_out[-1], axis)))
    ours, theirs = bits_per_byte_at(moe, axis, value), bits_per_byte_at(dense, axis, value)
    won = ours < theirs
    return Verdict(
        text=(
            f"At equal {words} ({show(value)}) the MoE {'beats' if won else 'loses to'} the dense model of equal "
            f"active parameters: {ours:.3f} against {theirs:.3f} bits per byte ({abs(1 - ours / theirs):.1%} "
            f"{'less' if won else 'more'})."
        ),
        is_good=won,
    )


def share_of_the_way(moe: float, active: float, total: float) -> float:
    """Where the MoE stands between its twins: 0 is the equal-active twin's loss, 1 the equal-total twin's."""
    return (active - moe) / (active - total) if active != total else math.nan


def where_it_stands(moe: float, active: float, total: float) -> str:
    """The MoE's place among its twins, in words; lower bits per byte are better."""
    if moe < min(active, total):
        return "ahead of both twins"
    if active <= total:
        return "not ahead of its equal-active twin, and neither is its equal-total twin"
    return f"{share_of_the_way(moe, active, total):.0%} of the way from its equal-active to its equal-total twin"


def _between(moe: ModelResult, active: ModelResult, total: ModelResult) -> Verdict:
    tokens = min(result.held_out[-1].tokens for result in (moe, active, total))
    ours, narrow, wide = (bits_per_byte_at(result, "tokens", tokens) for result in (moe, active, total))
    where = where_it_stands(ours, narrow, wide)
    return Verdict(
        text=(
            f"After the {tokens / 1e6:.2f}M tokens that all three have seen, the MoE ({ours:.3f} bits per byte) is "
            f"{where} ({narrow:.3f} equal-active, {wide:.3f} equal-total); the equal-total twin needs "
            f"{total.training_flops / total.training_tokens / (moe.training_flops / moe.training_tokens):.1f}x "
            "the compute per token."
        ),
        is_good=None,
    )


def _domains(moe: ModelResult, active: ModelResult) -> Verdict:
    ahead = [name for name, bits in moe.domain_bits_per_byte.items() if bits < active.domain_bits_per_byte[name]]
    behind = [name for name in moe.domain_bits_per_byte if name not in ahead]
    tail = f"; behind in {', '.join(behind)}" if behind else ""
    return Verdict(
        text=f"The MoE is ahead of its equal-active twin in {len(ahead)} of {len(ahead + behind)} domains{tail}.",
        is_good=len(ahead) > len(behind),
    )


def _price(moe: ModelResult, active: ModelResult) -> Verdict:
    training = moe.training_tokens_per_s / active.training_tokens_per_s
    decoding = moe.decoding_tokens_per_s / active.decoding_tokens_per_s
    return Verdict(
        text=(
            f"The price: {moe.total_parameters / active.total_parameters:.1f}x the parameters in memory, "
            f"{training:.2f}x the training speed and {decoding:.2f}x the decoding speed of the equal-active twin."
        ),
        is_good=None,
    )


def _router(loads: Sequence[StepLoad]) -> Verdict:
    health = RouterHealth.of(sum_loads(loads))
    return Verdict(
        text=f"The router over the last {len(loads)} steps: {health.verdict} (MaxVio {health.max_violation:.2f}).",
        is_good=health.is_healthy,
    )
