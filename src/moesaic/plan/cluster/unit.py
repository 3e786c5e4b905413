"""Devices that do steps together: attention each for its own texts, experts for all. G ranks."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moesaic.checks import require
from moesaic.config import ModelConfig
from moesaic.plan.cluster.exchange import direct
from moesaic.plan.cluster.placed import Placed
from moesaic.plan.cluster.rates import timed
from moesaic.plan.flops import Kind, Step, step_ops
from moesaic.plan.formats import Formats, weight_bytes
from moesaic.plan.hardware import Device
from moesaic.plan.layout import Layout
from moesaic.plan.network import step_traffic
from moesaic.plan.roofline import StepTime

MEMORY_SHARE = 0.9
"""Of a device's memory that weights and caches may fill; the rest is for activations and buffers."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """`ranks` devices with one copy of all experts between them and `redundant` replicas; dense parts on each.

    new: tokens that a decode step brings for each text (1, and the drafts that it verifies).
    overlap: the share of the shorter of computing and sending that hides behind the longer.
    """

    config: ModelConfig
    formats: Formats
    device: Device
    ranks: int
    placed: Placed
    redundant: int = 0
    new: int = 1
    overlap: float = 1.0

    @property
    def layout(self) -> Layout:
        return Layout(dp=self.ranks, ep=self.ranks, redundant=self.redundant)

    def step(self, kind: Kind, texts: float, new: float, context: float) -> StepTime:
        """A step with `texts` on each rank. The busiest rank receives as much more as it computes more."""
        step = Step(kind=kind, texts=texts * self.ranks, new=new, context=context)
        ops = step_ops(self.config, self.formats, step, self.layout, self.placed)
        if kind == "decode":
            traffic = direct(self.config, self.formats, texts * new, self.ranks, self.device.per_node)
        else:
            traffic = step_traffic(self.config, self.formats, step, self.layout, self.device)
        return StepTime(
            step=step,
            ops=tuple(timed(op, self.device) for op in ops),
            traffic=traffic,
            sending=traffic.seconds(self.device) * self.placed.mean_uneven,
            overlap=self.overlap,
        )

    def prefill(self, tokens: float, context: float) -> StepTime:
        """Prompts of `context` tokens each, `tokens` in all on each rank."""
        return self.step("prefill", tokens / context, context, context)

    def decode(self, texts: float, context: float) -> StepTime:
        """The next tokens of `texts` texts on each rank."""
        return self.step("decode", texts, self.new, context)

    @cached_property
    def weight_bytes(self) -> float:
        """Of the fullest rank."""
        by_role = weight_bytes(self.config.parameters(), self.formats)
        copies = self.placed.placement.num_slots / self.placed.placement.num_experts / self.ranks
        return sum(size * (copies if role == "experts" else 1.0) for role, size in by_role.items())

    @property
    def state_bytes(self) -> float:
        """Of one token of a text of middling length."""
        length = min(4096, self.config.context_length)
        return self.formats.state_bytes(self.config, length) / length

    @cached_property
    def cache_tokens(self) -> int:
        """How many tokens' state each rank has room for. Raises ConfigError where weights leave none."""
        left = self.device.memory_bytes * MEMORY_SHARE - self.weight_bytes
        fewest = self.weight_bytes / (self.device.memory_bytes * MEMORY_SHARE)
        require(
            left > self.state_bytes * 1024,
            f"{self.ranks} {self.device.name} hold {self.weight_bytes / 1e9:.0f} GB of weights each, {fewest:.2g} "
            "times their "
            "room; use more ranks a unit, a narrower format, or devices with more memory",
        )
        return int(left / self.state_bytes)


class Table:
    """A step's seconds, looked up: linear between steps that were computed, since rooflines are nearly so.

    rest: seconds of all but experts, by texts of a rank and context. experts, sending: by tokens of a rank.
    """

    def __init__(self, unit: Unit, kind: Kind, most_texts: float, longest: float) -> None:
        self.unit, self.kind = unit, kind
        self.texts = np.unique(np.geomspace(1, max(2.0, most_texts), 8))
        self.contexts = np.unique(np.geomspace(min(128.0, longest / 2), longest, 5))
        self.rest = np.array([[self._rest(texts, each) for each in self.contexts] for texts in self.texts])
        self.tokens = self.texts * (unit.new if kind == "decode" else 1.0)
        steps = [unit.step(kind, texts, unit.new if kind == "decode" else 1, self.contexts[0]) for texts in self.texts]
        self.experts = np.array([_experts(step) for step in steps])
        self.sending = np.array([step.sending for step in steps])

    def _rest(self, texts: float, context: float) -> float:
        """Experts are left out, so even routing will do."""
        unit = self.unit
        new, texts = (unit.new, texts) if self.kind == "decode" else (context, texts / context)
        step = Step(kind=self.kind, texts=texts * unit.ranks, new=new, context=context)
        ops = step_ops(unit.config, unit.formats, step, unit.layout)
        return sum(timed(op, unit.device).seconds for op in ops if op.name != "experts")

    def seconds(self, texts: float, context: float, tokens: float, slow: float = 1.0) -> float:
        """A step of the busiest rank's texts (prefill: tokens) of so long a context, with `tokens` on a rank on
        average. slow: by how much its slowest device computes longer."""
        working = slow * (_at(self.rest, self.texts, self.contexts, texts, context) + self._of(self.experts, tokens))
        sending = self._of(self.sending, tokens)
        return working + sending - self.unit.overlap * min(working, sending)

    def _of(self, seconds: NDArray[np.float64], tokens: float) -> float:
        if tokens > self.tokens[-1]:  # all experts are read by then, so what is added is rows
            slope = (seconds[-1] - seconds[-2]) / (self.tokens[-1] - self.tokens[-2])
            return float(seconds[-1] + (tokens - self.tokens[-1]) * slope)
        return float(np.interp(tokens, self.tokens, seconds))


def _experts(step: StepTime) -> float:
    return sum(op.seconds for op in step.ops if op.op.name == "experts")


def _at(table: NDArray[np.float64], xs: NDArray[np.float64], ys: NDArray[np.float64], x: float, y: float) -> float:
    """Between four cells; beyond the edges as the last two of them go on."""
    i = min(max(int(np.searchsorted(xs, x)) - 1, 0), len(xs) - 2)
    j = min(max(int(np.searchsorted(ys, y)) - 1, 0), len(ys) - 2)
    u, v = (x - xs[i]) / (xs[i + 1] - xs[i]), (y - ys[j]) / (ys[j + 1] - ys[j])
    between = table[i] * (1 - u) + table[i + 1] * u
    return float(between[j] * (1 - v) + between[j + 1] * v)
