"""Where the time of a profiled step goes: a trace's events, told apart by the phases of a Mixture-of-Experts step.

A trace is what `torch.profiler` exports (Chrome's format: microseconds). Names of modules come from annotations that
train/profile.py leaves, operations of ours from their registered names, and a backward operation belongs to the phase
of the forward operation that has its sequence number.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

STEP = "moesaic step"  # the annotation around a profiled step
AFTER_BACKWARD = "gradient norm, statistics"  # operations outside of modules and optimizer, once gradients are there

PHASES = (
    "embedding",
    "norm",
    "attention",
    "router",
    "dispatch",
    "experts: gate and up",
    "experts: activation",
    "experts: down",
    "experts",
    "combine",
    "shared experts",
    "mlp",
    "moe, the rest",
    "residual",
    "loss",
    AFTER_BACKWARD,
    "optimizer",
    "between",
)
"""In the order of a step. "between" is Python and waiting: no operation ran. "experts" is Python between their parts;
an activation that is fused with its product counts as gate and up."""

# Where our own operations belong, by the beginning of their registered names, when no module says so.
_OPERATIONS = (
    ("moesaic::select_topk", "router"),
    ("moesaic::sort_rows", "dispatch"),
    ("moesaic::gather_rows", "dispatch"),
    ("moesaic::combine_rows", "combine"),
)
_PRODUCT = "moesaic::grouped"
_ACTIVATION = "moesaic::silu_mul"
_EXPERTS = ("experts", "moe, the rest")
_LAYER = re.compile(r"\blayers\.(\d+)\b")
_BACKWARD = "autograd::engine::evaluate_function"


class Place(NamedTuple):
    """What a moment of a step belongs to; `layer` is None outside of layers."""

    phase: str
    layer: int | None = None
    is_backward: bool = False


_BACKWARD_START = Place("loss", None, True)


class Span(NamedTuple):
    """A stretch of time that belongs to one place, in microseconds."""

    place: Place
    start_us: float
    end_us: float


class PhaseTime(NamedTuple):
    """A phase's time in milliseconds a step, and its share of the step."""

    phase: str
    forward_ms: float
    backward_ms: float
    share: float


def annotation(phase: str, module_name: str) -> str:
    """The name under which a module's forward stands in the trace."""
    return f"{phase}: {module_name}"


def spans(events: Iterable[dict[str, Any]]) -> list[Span]:
    """The profiled steps cut into spans, in order and without overlap; neighbours of one place are one span."""
    timed = [event for event in events if event.get("ph") == "X" and event.get("cat") in ("cpu_op", "user_annotation")]
    threads = {event["tid"] for event in timed if event["name"] == STEP}
    ours = [event for event in timed if event["tid"] in threads]
    ours.sort(key=lambda event: (event["ts"], -event["dur"]))
    return list(_merged(_Walk().walk(ours)))


def phase_times(found: Iterable[Span], num_steps: int) -> list[PhaseTime]:
    """The phases that took time, in the order of a step."""
    spent: dict[tuple[str, bool], float] = {}
    for place, start_us, end_us in found:
        key = (place.phase, place.is_backward)
        spent[key] = spent.get(key, 0.0) + (end_us - start_us) / 1e3 / num_steps
    whole = sum(spent.values())
    times = []
    for phase in PHASES:
        forward, backward = spent.get((phase, False), 0.0), spent.get((phase, True), 0.0)
        if forward or backward:
            times.append(PhaseTime(phase, forward, backward, (forward + backward) / whole))
    return times


def _merged(found: Iterator[Span]) -> Iterator[Span]:
    last: Span | None = None
    for span in found:
        if last is not None and last.place == span.place and last.end_us == span.start_us:
            last = last._replace(end_us=span.end_us)
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


class _Frame(NamedTuple):
    end_us: float
    place: Place


@dataclass
class _Walk:
    """One pass over events sorted by their start, which nest; `stage` is how far the step is."""

    stack: list[_Frame] = field(default_factory=list)
    now_us: float = 0.0
    stage: str = "between"
    by_sequence: dict[int, Place] = field(default_factory=dict)
    last_backward: Place = _BACKWARD_START
    multiplied: set[int | None] = field(default_factory=set)

    def walk(self, events: list[dict[str, Any]]) -> Iterator[Span]:
        for event in events:
            yield from self._leave(event["ts"])
            if not self.stack and event["name"] != STEP:
                continue  # an evaluation or a checkpoint between the profiled steps
            yield from self._advance(event["ts"])
            self.stack.append(_Frame(event["ts"] + event["dur"], self._place(event)))
        yield from self._leave(float("inf"))

    def _leave(self, at_us: float) -> Iterator[Span]:
        """Close what ended before `at_us`."""
        while self.stack and self.stack[-1].end_us <= at_us:
            yield from self._advance(self.stack[-1].end_us)
            self.stack.pop()

    def _advance(self, to_us: float) -> Iterator[Span]:
        """The time up to `to_us` belongs to the innermost event that is open."""
        if self.stack and to_us > self.now_us:
            yield Span(self.stack[-1].place, self.now_us, to_us)
        self.now_us = to_us

    def _place(self, event: dict[str, Any]) -> Place:
        name = event["name"]
        if name == STEP:
            self.stage = "between"
            return Place("between")
        outer = self.stack[-1].place
        if name.startswith(_BACKWARD):
            return self._backward(event)
        place = self._forward(name, outer)
        sequence = event["args"].get("Sequence number")
        if sequence is not None and not outer.is_backward:
            self.by_sequence[sequence] = place  # of several, the last one makes the backward node
        return place

    def _backward(self, event: dict[str, Any]) -> Place:
        """The place of the forward operation; gradients that are put in their parameter follow the one before."""
        self.stage = AFTER_BACKWARD
        known = self.by_sequence.get(event["args"].get("Sequence number", -1))
        if known is not None:
            self.last_backward = known._replace(is_backward=True)
        return self.last_backward

    def _forward(self, name: str, outer: Place) -> Place:
        phase, separator, module = name.partition(": ")
        if separator and phase in PHASES:
            return self._enter_module(phase, module, outer)
        if outer.phase == "between":
            return Place(self.stage)
        return outer._replace(phase=self._operation(name, outer))

    def _enter_module(self, phase: str, module: str, outer: Place) -> Place:
        layer = _LAYER.search(module)
        place = Place(phase, int(layer[1]) if layer else None, outer.is_backward)
        if outer.phase == "between":
            # What follows the last module and precedes the backward pass is the loss.
            self.stage = AFTER_BACKWARD if phase == "optimizer" else "loss"
        if phase in _EXPERTS:
            self.multiplied.discard(place.layer)
        return place

    def _operation(self, name: str, outer: Place) -> str:
        """The phase of an operation inside of a module: the experts' first product is gate and up, the next is down."""
        if name.startswith(_ACTIVATION) and outer.phase.startswith("experts"):
            return "experts: activation"
        if outer.phase not in _EXPERTS:
            return outer.phase
        if name.startswith(_PRODUCT):
            is_first = outer.layer not in self.multiplied
            self.multiplied.add(outer.layer)
            return "experts: gate and up" if is_first else "experts: down"
        if outer.phase == "experts":
            return "experts: activation"
        return next((phase for start, phase in _OPERATIONS if name.startswith(start)), outer.phase)
