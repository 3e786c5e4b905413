"""The experts at work: how the tokens of a model that is being served fall on its experts, now and since the start.

N tokens that wait to be counted, M columns of choices, S steps, E experts.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moesaic.config import MoeConfig
from moesaic.engine.engine import Engine
from moesaic.serve.seen import StepSeen
from moesaic.telemetry.health import LayerHealth
from moesaic.telemetry.load import LayerLoad, StepLoad

WAITING = 1024  # tokens: counting costs most of its time by the call
EVERY_S = 0.5
LONGEST_S = 60.0


class LayerTally(NamedTuple):
    """Rows of each expert, and how many experts each step had work for, added up over the steps."""

    counts_E: np.ndarray
    distinct: int


class Tally(NamedTuple):
    """What has been counted of a number of steps, by layer that routes. Tallies of one model can be subtracted."""

    steps: int
    tokens: int
    layers: dict[int, LayerTally]

    def less(self, before: "Tally") -> "Tally":
        """What came since an earlier tally."""
        layers = {
            layer: LayerTally(
                now.counts_E - before.layers[layer].counts_E, now.distinct - before.layers[layer].distinct
            )
            for layer, now in self.layers.items()
        }
        return Tally(self.steps - before.steps, self.tokens - before.tokens, layers)


class LiveRouting:
    """Hears an engine's steps and counts, layer by layer, the experts that their tokens went to.

    `hear` is called by the thread that runs the engine, after each step; all else by any thread. Tokens of drafts that
    were not accepted count too: they were work. A dense model has no layers here.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._lock = threading.Lock()
        self._layers = {
            layer: _LayerCounts(columns, *_sizes(engine, layer))
            for layer, columns in engine.program.routing_columns.items()
        }
        self._ends: list[int] = []  # of the steps that wait
        self._steps = self._tokens = 0
        self._started = self._heard = clock()
        self._marks = deque([(self._started, self._tally())])  # counts at times, the oldest first

    @property
    def age_s(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    @property
    def routes(self) -> bool:
        """Whether the model has experts at all."""
        return bool(self._layers)

    def hear(self, _seen: StepSeen | None = None) -> None:
        """Read what the tokens of the newest step chose; what `Loop.listen` takes."""
        num_tokens = self._engine.num_routed
        if not num_tokens or not self._layers:
            return
        with self._lock:
            now = self._clock()
            if now - self._marks[-1][0] >= EVERY_S:
                self._mark(now)
            start = self._ends[-1] if self._ends else 0
            if start + num_tokens > WAITING:
                self._count()
                start = 0
            self._read(start, start + num_tokens)
            self._heard = now

    def total(self) -> Tally:
        """Everything since the start."""
        with self._lock:
            return self._tally()

    def window(self, seconds: float) -> Tally:
        """The last seconds, half a second more or less; LONGEST_S at most."""
        with self._lock:
            now, since = self._tally(), self._clock() - min(seconds, LONGEST_S)
            if self._heard < since:
                return now.less(now)
            before = [tally for at, tally in self._marks if at <= since]
            return now.less(before[-1] if before else self._marks[0][1])

    def as_load(self, tally: Tally) -> StepLoad:
        """A tally as the loads that reports and metrics are made of; no router_entropy: scores stay in the engine."""
        layers = tuple(
            LayerLoad(
                layer=layer,
                top_k=self._layers[layer].top_k,
                counts_E=counted.counts_E,
                num_tokens=tally.tokens,
                router_entropy=math.nan,
            )
            for layer, counted in tally.layers.items()
        )
        return StepLoad(step=tally.steps, layers=layers)

    def to_json(self, tally: Tally) -> dict[str, Any]:
        """A tally for the wire: counts, and what they say about each layer."""
        loads = self.as_load(tally).layers
        layers = [_layer_json(load, tally.layers[load.layer].distinct, tally.steps) for load in loads]
        return {"steps": tally.steps, "tokens": tally.tokens, "layers": layers}

    @staticmethod
    def counts(tally: Tally) -> dict[str, Any]:
        """The same without what can be worked out from it, for those who are told often."""
        layers = [
            {"layer": layer, "counts": counted.counts_E.tolist(), "distinct": counted.distinct}
            for layer, counted in tally.layers.items()
        ]
        return {"steps": tally.steps, "tokens": tally.tokens, "layers": layers}

    def _read(self, start: int, end: int) -> None:
        read = self._engine.program.read_choices
        for layer, counts in self._layers.items():
            if end > len(counts.ids_NM):  # a step of more tokens than wait
                counts.make_room(end)
            read(layer, counts.ids_NM[start:end], counts.weights_NM[start:end])
        self._ends.append(end)

    def _mark(self, now: float) -> None:
        """Keep the counts up to here under the time of the newest step: idle time belongs to no window."""
        self._marks.append((self._heard, self._tally()))
        while len(self._marks) > 1 and self._marks[1][0] <= now - LONGEST_S:
            self._marks.popleft()

    def _count(self) -> None:
        if not self._ends:
            return
        lengths_S = np.diff(self._ends, prepend=0)
        step_of_N = np.repeat(np.arange(len(lengths_S)), lengths_S)
        for counts in self._layers.values():
            counts.add(step_of_N, len(lengths_S))
        self._steps, self._tokens = self._steps + len(lengths_S), self._tokens + len(step_of_N)
        self._ends.clear()

    def _tally(self) -> Tally:
        self._count()
        layers = {layer: LayerTally(counts.counts_E.copy(), counts.distinct) for layer, counts in self._layers.items()}
        return Tally(self._steps, self._tokens, layers)


class _LayerCounts:
    """One layer's choices that wait, and what has been counted."""

    def __init__(self, columns: int, num_experts: int, top_k: int) -> None:
        self.num_experts, self.top_k, self.columns = num_experts, top_k, columns
        self.counts_E, self.distinct = np.zeros(num_experts, np.int64), 0
        self.make_room(WAITING)

    def make_room(self, num_tokens: int) -> None:
        """For so many tokens; nothing waits."""
        self.ids_NM = np.empty((num_tokens, self.columns), np.int64)
        self.weights_NM = np.empty((num_tokens, self.columns), np.float32)

    def add(self, step_of_N: np.ndarray, num_steps: int) -> None:
        """Count the choices that wait. Those of -1 (none) go to a place of their own."""
        width = self.num_experts + 1
        places_NM = self.ids_NM[: len(step_of_N)] + (step_of_N * width + 1)[:, None]
        counts_SE = np.bincount(places_NM.reshape(-1), minlength=num_steps * width).reshape(num_steps, width)[:, 1:]
        self.counts_E += counts_SE.sum(0)
        self.distinct += int(np.count_nonzero(counts_SE))


def _sizes(engine: Engine, layer: int) -> tuple[int, int]:
    part = engine.config.layers[layer].feed_forward
    assert isinstance(part, MoeConfig)
    return part.num_experts, part.router.top_k


def _layer_json(load: LayerLoad, distinct: int, steps: int) -> dict[str, Any]:
    health = LayerHealth.of(load)
    return {
        "layer": load.layer,
        "num_experts": load.num_experts,
        "top_k": load.top_k,
        "counts": load.counts_E.tolist(),
        "distinct": distinct,
        "distinct_per_step": _known(distinct / steps if steps else math.nan),
        "load_entropy": _known(health.load_entropy),
        "effective_experts": _known(health.effective_experts),
        "max_violation": _known(health.max_violation),
        "dead": None if health.dead is None else list(health.dead),
    }


def _known(value: float) -> float | None:
    """Four digits after the point; JSON has no NaN."""
    return None if math.isnan(value) else round(value, 4)
