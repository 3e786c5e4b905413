"""Listens to the engine: what each step's tokens chose, counted where the step left it.

T tokens, E experts, M columns of choices.
"""

import math

import numpy as np

from moesaic.engine.engine import Engine
from moesaic.engine.program import Routed
from moesaic.telemetry.choices import ChoiceCounts
from moesaic.telemetry.load import LayerLoad, StepLoad
from moesaic.trace import TokenRows, TracedForward, TraceWriter


class EngineRecorder:
    """Adds up the loads of an engine's steps. Call `hear` after each `Engine.step`; the step's results are not touched.

    trace: also gets every step as a forward of a routing trace (weights included). Its texts' tokens stand in the order
    of the step's pieces. Of a dense model it hears nothing.
    """

    def __init__(self, engine: Engine, *, trace: TraceWriter | None = None) -> None:
        self.engine, self.trace = engine, trace
        self.step = 0
        self._counts = ChoiceCounts(engine)
        self._num_tokens = 0

    def hear(self) -> None:
        """Count what the tokens of the newest step chose."""
        num_tokens = self.engine.num_routed
        if not num_tokens or not self._counts.top_k:
            return
        self._counts.add()
        self._num_tokens += num_tokens
        if self.trace is not None:
            counts = self._counts.by_layer()
            rows = {layer: _rows(routed, len(counts[layer])) for layer, routed in self.engine.routed().items()}
            self.trace.append(TracedForward(rows=rows))

    def finish(self, step: int | None = None) -> StepLoad:
        """The loads of everything heard since the last call, then start anew. Windows number themselves from 1.

        Scores and logits stay in the engine: router_entropy is NaN, and there are no mean scores.
        """
        self.step = self.step + 1 if step is None else step
        num_tokens, self._num_tokens = self._num_tokens, 0
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


def _rows(routed: Routed, num_experts: int) -> TokenRows:
    """A step's rows as a trace has them."""
    ids_TM, weights_TM = (part.numpy() for part in routed)
    is_row_TM = (ids_TM >= 0) & (ids_TM < num_experts)
    choices_TM = np.broadcast_to(np.arange(ids_TM.shape[1]), ids_TM.shape)
    offsets = np.zeros(len(ids_TM) + 1, np.int64)
    offsets[1:] = is_row_TM.sum(axis=1).cumsum()
    return TokenRows(offsets, ids_TM[is_row_TM], choices_TM[is_row_TM], weights_TM[is_row_TM])
