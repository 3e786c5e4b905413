"""Listens to the engine: what each step's tokens chose, counted where the step left it.

T tokens, E experts, M columns of choices.
"""

import math
from collections.abc import Callable

import numpy as np

from moesaic.engine.engine import Engine
from moesaic.engine.program import Routed
from moesaic.telemetry.choices import ChoiceCounts
from moesaic.telemetry.load import LayerLoad, StepLoad
from moesaic.trace import TokenRows, TracedForward, TraceWriter


class EngineRecorder:
    """Adds up the loads of an engine's steps; the steps' results are not touched.

    hear(): call it after each `Engine.step`, whose tokens' choices are counted; after `ahead` it does nothing. Without
    a trace it is one native call, which costs less than a method would.
    trace: also gets every step as a forward of a routing trace (weights included). Its texts' tokens stand in the order
    of the step's pieces. Of a dense model it hears nothing.
    """

    def __init__(self, engine: Engine, *, trace: TraceWriter | None = None) -> None:
        self.engine, self.trace = engine, trace
        self.step = 0
        self._counts = ChoiceCounts(engine)
        self.hear: Callable[[], None] = self._counts.add if trace is None else self._trace_and_count

    def finish(self, step: int | None = None) -> StepLoad:
        """The loads of everything heard since the last call, then start anew. Windows number themselves from 1.

        Scores and logits stay in the engine: router_entropy is NaN, and there are no mean scores.
        """
        self.step = self.step + 1 if step is None else step
        num_tokens = self._counts.num_tokens
        layers = tuple(
            LayerLoad(
                layer=layer,
                top_k=self._counts.top_k[layer],
                counts_E=counts_E,
                num_tokens=num_tokens,
                router_entropy=math.nan,
            )
            for layer, counts_E in self._counts.by_layer().items()
        )
        self._counts.clear()
        return StepLoad(step=self.step, layers=layers)

    def _trace_and_count(self) -> None:
        if self.trace is not None and self.engine.num_routed and self._counts.top_k:
            counts = self._counts.by_layer()
            rows = {layer: _rows(routed, len(counts[layer])) for layer, routed in self.engine.routed().items()}
            self.trace.append(TracedForward(rows=rows))
        self._counts.add()


def _rows(routed: Routed, num_experts: int) -> TokenRows:
    """A step's rows as a trace has them."""
    ids_TM, weights_TM = (part.numpy() for part in routed)
    is_row_TM = (ids_TM >= 0) & (ids_TM < num_experts)
    choices_TM = np.broadcast_to(np.arange(ids_TM.shape[1]), ids_TM.shape)
    offsets = np.zeros(len(ids_TM) + 1, np.int64)
    offsets[1:] = is_row_TM.sum(axis=1).cumsum()
    return TokenRows(offsets, ids_TM[is_row_TM], choices_TM[is_row_TM], weights_TM[is_row_TM])
