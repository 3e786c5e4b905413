"""Rows of each expert, added up over an engine's steps: one native call a step, whatever the number of layers.

E experts, L layers that route, N experts of all of these.
"""

import numpy as np

from moesaic.config import MoeConfig
from moesaic.engine.engine import Engine


class ChoiceCounts:
    """Counts of the layers that route, in their order. top_k: of each layer's router. Of a dense model it has none."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        parts = {layer: _moe(engine, layer) for layer in engine.program.routing_columns}
        self.top_k = {layer: part.router.top_k for layer, part in parts.items()}
        self._ends_L = np.cumsum([part.num_experts for part in parts.values()], dtype=np.int64)
        self._counts_N = np.zeros(self._ends_L[-1] if parts else 0, np.int64)
        self._distinct_L = np.zeros(len(parts), np.int64)

    def add(self) -> None:
        """Count what the tokens of the newest `Engine.step` chose."""
        if self.top_k:
            self._engine.program.count_choices(self._counts_N, self._distinct_L)

    def clear(self) -> None:
        """Begin again."""
        self._counts_N[:] = self._distinct_L[:] = 0

    def by_layer(self) -> dict[int, np.ndarray]:
        """Copies of the counts, int64 [E]."""
        parts = np.split(self._counts_N.copy(), self._ends_L[:-1]) if self.top_k else []
        return dict(zip(self.top_k, parts, strict=True))

    def distinct(self) -> dict[int, int]:
        """How many experts each step had work for, added up, by layer."""
        return dict(zip(self.top_k, self._distinct_L.tolist(), strict=True))


def _moe(engine: Engine, layer: int) -> MoeConfig:
    part = engine.config.layers[layer].feed_forward
    assert isinstance(part, MoeConfig)
    return part
