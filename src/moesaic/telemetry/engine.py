"""Listens to the engine: what each step's tokens chose, read from the step's own buffers, counted now and then.

T tokens, E experts, M columns of choices, N tokens that wait to be counted.
"""

import math

import numpy as np

from moesaic.config import ModelConfig, MoeConfig
from moesaic.engine.engine import Engine
from moesaic.telemetry.load import LayerLoad, StepLoad
from moesaic.trace import TokenRows, TracedForward, TraceWriter

WAITING = 1024  # tokens: counting costs most of its time by the call


class EngineRecorder:
    """Adds up the loads of an engine's steps. Call `hear` after each `Engine.step`; the step's results are not touched.

    trace: also gets every step as a forward of a routing trace (weights included). Its texts' tokens stand in the order
    of the step's pieces. Of a dense model it hears nothing.
    """

    def __init__(self, engine: Engine, *, trace: TraceWriter | None = None) -> None:
        self.engine, self.trace = engine, trace
        self.step = 0
        self._layers = {
            layer: _LayerBuffer(columns, *_sizes(engine.config, layer))
            for layer, columns in engine.program.routing_columns.items()
        }
        self._filled = self._num_tokens = 0

    def hear(self) -> None:
        """Read what the tokens of the newest step chose."""
        num_tokens = self.engine.num_routed
        if not num_tokens or not self._layers:
            return
        if self._filled + num_tokens > WAITING:
            self._count()
        start, end = self._filled, self._filled + num_tokens
        read = self.engine.program.read_choices
        for layer, buffer in self._layers.items():
            if end > len(buffer.ids_NM):  # a step of more tokens than wait
                buffer.grow(end)
            read(layer, buffer.ids_NM[start:end], buffer.weights_NM[start:end])
        self._filled, self._num_tokens = end, self._num_tokens + num_tokens
        if self.trace is not None:
            rows = {layer: buffer.rows(start, end) for layer, buffer in self._layers.items()}
            self.trace.append(TracedForward(rows=rows))

    def finish(self, step: int | None = None) -> StepLoad:
        """The loads of everything heard since the last call, then start anew. Windows number themselves from 1.

        Scores and logits stay in the engine: router_entropy is NaN, and there are no mean scores.
        """
        self._count()
        self.step = self.step + 1 if step is None else step
        num_tokens, self._num_tokens = self._num_tokens, 0
        return StepLoad(
            step=self.step,
            layers=tuple(
                LayerLoad(
                    layer=layer,
                    top_k=buffer.top_k,
                    counts_E=buffer.take(),
                    num_tokens=num_tokens,
                    router_entropy=math.nan,
                )
                for layer, buffer in self._layers.items()
            ),
        )

    def _count(self) -> None:
        for buffer in self._layers.values():
            buffer.count(self._filled)
        self._filled = 0


class _LayerBuffer:
    """One layer's choices that wait, and the counts so far."""

    def __init__(self, columns: int, num_experts: int, top_k: int) -> None:
        self.num_experts, self.top_k = num_experts, top_k
        self.ids_NM = np.empty((WAITING, columns), np.int64)
        self.weights_NM = np.empty((WAITING, columns), np.float32)
        self._counts_E = np.zeros(num_experts, np.int64)

    def grow(self, num_tokens: int) -> None:
        """Room for so many tokens; nothing waits."""
        columns = self.ids_NM.shape[1]
        self.ids_NM, self.weights_NM = (
            np.empty((num_tokens, columns), np.int64),
            np.empty((num_tokens, columns), np.float32),
        )

    def count(self, num_tokens: int) -> None:
        """Choices of -1 (none) go to a place of their own."""
        found = np.bincount(self.ids_NM[:num_tokens].reshape(-1) + 1, minlength=self.num_experts + 1)
        self._counts_E += found[1 : self.num_experts + 1]

    def take(self) -> np.ndarray:
        """The counts, which begin again."""
        counts_E, self._counts_E = self._counts_E, np.zeros_like(self._counts_E)
        return counts_E

    def rows(self, start: int, end: int) -> TokenRows:
        """The step's rows as a trace has them."""
        ids_TM, weights_TM = self.ids_NM[start:end], self.weights_NM[start:end]
        is_row_TM = (ids_TM >= 0) & (ids_TM < self.num_experts)
        choices_TM = np.broadcast_to(np.arange(ids_TM.shape[1]), ids_TM.shape)
        offsets = np.zeros(len(ids_TM) + 1, np.int64)
        offsets[1:] = is_row_TM.sum(axis=1).cumsum()
        return TokenRows(offsets, ids_TM[is_row_TM], choices_TM[is_row_TM], weights_TM[is_row_TM])


def _sizes(config: ModelConfig, layer: int) -> tuple[int, int]:
    part = config.layers[layer].feed_forward
    assert isinstance(part, MoeConfig)
    return part.num_experts, part.router.top_k
