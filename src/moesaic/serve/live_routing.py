"""The experts at work: how the tokens of a model that is being served fall on its experts, now and since the start.

E experts.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moesaic.engine.engine import Engine
from moesaic.serve.seen import StepSeen
from moesaic.telemetry.choices import ChoiceCounts
from moesaic.telemetry.health import LayerHealth
from moesaic.telemetry.load import LayerLoad, StepLoad

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
        self._counts = ChoiceCounts(engine)
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
        return bool(self._counts.top_k)

    def hear(self, _seen: StepSeen | None = None) -> None:
        """Count what the tokens of the newest step chose; what `Loop.listen` takes."""
        num_tokens = self._engine.num_routed
        if not num_tokens or not self.routes:
            return
        with self._lock:
            now = self._clock()
            if now - self._marks[-1][0] >= EVERY_S:
                self._mark(now)
            self._counts.add()
            self._steps, self._tokens = self._steps + 1, self._tokens + num_tokens
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
                top_k=self._counts.top_k[layer],
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
        layers = [layer_json(load, tally.layers[load.layer].distinct, tally.steps) for load in loads]
        return {"steps": tally.steps, "tokens": tally.tokens, "layers": layers}

    @staticmethod
    def counts(tally: Tally) -> dict[str, Any]:
        """The same without what can be worked out from it, for those who are told often."""
        layers = [
            {"layer": layer, "counts": counted.counts_E.tolist(), "distinct": counted.distinct}
            for layer, counted in tally.layers.items()
        ]
        return {"steps": tally.steps, "tokens": tally.tokens, "layers": layers}

    def _mark(self, now: float) -> None:
        """Keep the counts up to here under the time of the newest step: idle time belongs to no window."""
        self._marks.append((self._heard, self._tally()))
        while len(self._marks) > 1 and self._marks[1][0] <= now - LONGEST_S:
            self._marks.popleft()

    def _tally(self) -> Tally:
        distinct = self._counts.distinct()
        layers = {layer: LayerTally(counts_E, distinct[layer]) for layer, counts_E in self._counts.by_layer().items()}
        return Tally(self._steps, self._tokens, layers)


def layer_json(load: LayerLoad, distinct: int, steps: int) -> dict[str, Any]:
    """A layer for the wire. distinct: experts that each of the steps had work for, added up."""
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
