"""How long a step takes: for each operation the longer of reading and computing, and what is sent between devices.

(Roofline: Williams, Waterman and Patterson, doi:10.1145/1498765.1498785.)
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from moesaic.checks import require
from moesaic.config import ModelConfig
from moesaic.plan.flops import Op, Step, step_ops
from moesaic.plan.formats import Formats
from moesaic.plan.hardware import Device
from moesaic.plan.layout import Layout
from moesaic.plan.network import Traffic, step_traffic
from moesaic.plan.routing import Routing

Limit = Literal["bandwidth", "compute", "network", "launches"]


class OpTime(NamedTuple):
    """Seconds of an operation, and of each limit by itself."""

    op: Op
    reading: float
    computing: float
    launching: float

    @property
    def seconds(self) -> float:
        return max(self.reading, self.computing) + self.launching

    @property
    def by(self) -> Limit:
        longest = max(self.reading, self.computing)
        if self.launching > longest:
            return "launches"
        return "compute" if self.computing > self.reading else "bandwidth"


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """`drafts` tokens are guessed for each text, and one step looks at all of them.

    acceptance: the share of drafts that are what the model would have written, each given that the ones before are.
    draft_cost: what drafting them takes, as a share of the step.
    """

    drafts: int = 0
    acceptance: float = 0.0
    draft_cost: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.drafts <= 1000, f"drafts={self.drafts}; use 0 to 1000")
        require(0 <= self.acceptance <= 1, f"acceptance={self.acceptance}; use a share from 0 to 1")

    @property
    def tokens_per_step(self) -> float:
        """Expected: 1 + a + a^2 + ... (Leviathan et al., arXiv:2211.17192, eq. 1)."""
        return sum(self.acceptance**power for power in range(self.drafts + 1))


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One step on a machine: what each operation takes, what is sent, and the whole.

    overlap: the share of the shorter of computing and sending that hides behind the longer.
    """

    step: Step
    ops: tuple[OpTime, ...]
    traffic: Traffic
    sending: float
    overlap: float

    @property
    def working(self) -> float:
        return sum(op.seconds for op in self.ops)

    @property
    def seconds(self) -> float:
        return self.working + self.sending - self.overlap * min(self.working, self.sending)

    @property
    def limits(self) -> dict[Limit, float]:
        """Seconds by what sets them."""
        found: dict[Limit, float] = {"bandwidth": 0.0, "compute": 0.0, "launches": 0.0, "network": self.sending}
        for op in self.ops:
            longest = "compute" if op.computing > op.reading else "bandwidth"
            found[longest] += max(op.reading, op.computing)
            found["launches"] += op.launching
        return found

    @property
    def bound_by(self) -> Limit:
        return max(self.limits, key=lambda limit: self.limits[limit])


def op_time(op: Op, device: Device) -> OpTime:
    """By the device's stated rates times its efficiencies."""
    share = device.efficiency
    computing = op.flops / (device.rate(op.number) * share.compute) if op.flops else 0.0
    reading = op.num_bytes / (device.bandwidth * share.memory)
    return OpTime(op, reading, computing, op.launches * share.kernel_s)


def step_time(
    config: ModelConfig,
    formats: Formats,
    step: Step,
    device: Device,
    layout: Layout | None = None,
    routing: Routing | None = None,
    *,
    overlap: float = 0.0,
) -> StepTime:
    """One step through all stages. With pipeline stages the texts are `pp` groups, which follow one another: a step of
    all of them takes as long as one group needs from the first stage to the last."""
    layout = layout or Layout()
    require(0 <= overlap <= 1, f"overlap={overlap}; use a share from 0 to 1")
    group = Step(kind=step.kind, texts=max(1.0, step.texts / layout.pp), new=step.new, context=step.context)
    ops = tuple(op_time(op, device) for op in step_ops(config, formats, group, layout, routing))
    traffic = step_traffic(config, formats, group, layout, device)
    return StepTime(step=step, ops=ops, traffic=traffic, sending=traffic.seconds(device), overlap=overlap)


def decode_step(batch: float, context: float, speculation: Speculation | None = None) -> Step:
    """The next token of each of `batch` texts of `context` tokens, or of it and the drafts."""
    drafts = speculation.drafts if speculation else 0
    return Step(kind="decode", texts=batch, new=1 + drafts, context=context)


def prefill_step(texts: float, tokens: float) -> Step:
    """Prompts of so many tokens, each at once."""
    return Step(kind="prefill", texts=texts, new=tokens, context=tokens)
