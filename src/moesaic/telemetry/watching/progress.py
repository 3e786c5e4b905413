"""A run's lines as curves of a bounded length: neighbours are joined when there are too many.

E experts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesaic.errors import DataError
from moesaic.telemetry.health import RouterHealth, load_shares
from moesaic.telemetry.load import LayerLoad, StepLoad, sum_loads

MOST_POINTS = 160
MOST_CELLS = 150_000  # of all load pictures: steps times layers times experts


@dataclass
class _Stretch:
    """Neighbouring steps as one: sums, and how many."""

    last_step: int
    steps: int
    loss: float
    rate: float
    load: StepLoad | None

    def joined(self, later: "_Stretch") -> "_Stretch":
        loads = [load for load in (self.load, later.load) if load is not None]
        return _Stretch(
            later.last_step,
            self.steps + later.steps,
            self.loss + later.loss,
            self.rate + later.rate,
            sum_loads(loads) if loads else None,
        )


@dataclass
class Progress:
    """What the lines of metrics.jsonl have said so far. Memory does not grow with the run."""

    last: dict[str, Any] = field(default_factory=dict)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    by_domain: dict[str, float] = field(default_factory=dict)
    _stretches: list[_Stretch] = field(default_factory=list)
    _open: _Stretch | None = None
    _steps_each: int = 1
    _shape: tuple[tuple[int, int], ...] | None = None

    def add(self, line: Mapping[str, Any]) -> None:
        """Take one line, or nothing of it.

        Raises KeyError, TypeError, ValueError, AttributeError, OverflowError or DataError for no line of this run.
        """
        if "loss" not in line:  # lines of other kinds may stand between
            return
        load = _without_domains(StepLoad.from_json(line["load"])) if "load" in line else None
        one = _Stretch(int(line["step"]), 1, float(line["loss"]), float(line["tokens_per_s"]), load)
        last = {name: _float(value) for name, value in line.items() if isinstance(value, int | float)}
        if load is not None and self._shape not in (None, load.shape):
            raise DataError("a line of a run with other layers or experts")
        if "held_out_bits_per_byte" in line:
            held_out = float(line["held_out_bits_per_byte"])
            self.by_domain = {name: float(value) for name, value in line["held_out_by_domain"].items()}
            self.held_out.append((one.last_step, held_out))
        self.last, self._shape = last, self._shape if load is None else load.shape
        self._open = one if self._open is None else self._open.joined(one)
        if self._open.steps >= self._steps_each:
            self._stretches.append(self._open)
            self._open = None
        if len(self._stretches) >= 2 * self._most(load):
            pairs = zip(self._stretches[::2], self._stretches[1::2], strict=True)
            self._stretches = [left.joined(right) for left, right in pairs]
            self._steps_each *= 2

    def _most(self, load: StepLoad | None) -> int:
        cells = sum(layer.num_experts for layer in load.layers) if load is not None else 0
        return max(16, min(MOST_POINTS // 2, MOST_CELLS // (2 * cells) if cells else MOST_POINTS))

    def to_json(self) -> dict[str, Any]:
        """Curves, and the load of every expert over time as multiples of its fair share; NaN is null."""
        stretches = [*self._stretches, *([self._open] if self._open else [])]
        routed = [(each.last_step, each.load) for each in stretches if each.load is not None and each.load.layers]
        return {
            "last": {name: _known(value) for name, value in self.last.items()},
            "steps": [each.last_step for each in stretches],
            "loss": [_known(each.loss / each.steps) for each in stretches],
            "tokens_per_s": [_known(each.rate / each.steps) for each in stretches],
            "held_out": [[step, _known(value)] for step, value in self.held_out],
            "by_domain": {name: _known(value) for name, value in self.by_domain.items()},
            "router": _router(routed) if routed else None,
        }


def _router(routed: list[tuple[int, StepLoad]]) -> dict[str, Any]:
    """The load pictures and each layer's evenness over time; the verdict is about the last stretches."""
    recent = sum_loads([load for _, load in routed[-4:]])
    health = [RouterHealth.of(load) for _, load in routed]
    now = RouterHealth.of(recent)
    layers = [
        {
            "layer": layer.layer,
            "num_experts": layer.num_experts,
            "ratios": [_ratios(load.layers[at]) for _, load in routed],
            "max_violation": [_known(each.layers[at].max_violation) for each in health],
            "load_entropy": [_known(each.layers[at].load_entropy) for each in health],
            "dead": None if now.layers[at].dead is None else len(now.layers[at].dead or ()),
        }
        for at, layer in enumerate(recent.layers)
    ]
    return {
        "steps": [step for step, _ in routed],
        "verdict": now.verdict,
        "is_healthy": now.is_healthy,
        "max_violation": _known(now.max_violation),
        "load_entropy": _known(now.load_entropy),
        "layers": layers,
    }


def _ratios(load: LayerLoad) -> list[float | None]:
    shares_E = load_shares(load.counts_E)
    if not shares_E.any():
        return [None] * load.num_experts
    return [round(float(share) * load.num_experts, 2) for share in shares_E]


def _without_domains(load: StepLoad) -> StepLoad:
    """The picture does not show them, and they are most of a load's bytes."""
    layers = (
        LayerLoad(
            layer=layer.layer,
            top_k=layer.top_k,
            counts_E=layer.counts_E,
            num_tokens=layer.num_tokens,
            router_entropy=layer.router_entropy,
            dropped_rows=layer.dropped_rows,
            lost_tokens=layer.lost_tokens,
        )
        for layer in load.layers
    )
    return StepLoad(step=load.step, layers=tuple(layers))


def _float(value: float) -> float:
    """Whole numbers stay whole. Raises OverflowError for one that no float holds."""
    float(value)
    return value


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
