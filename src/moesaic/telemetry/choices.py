"""Rows of each expert, added up over an engine's steps: one short native call a step, whatever the number of layers.

E experts, L layers that route, N experts of all of these.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from moesaic.config import MoeConfig
from moesaic.engine.engine import Engine


class ChoiceCounts:
    """Counts of the layers that route, in their order. Of a dense model it has none.

    top_k: of each layer's router. add(): count what the tokens of the newest `Engine.step` chose; nothing after
    `ahead`. It is the native call itself: after a step of decoding little of Python is left in the caches.
    """

    def __init__(self, engine: Engine) -> None:
        parts = {layer: _moe(engine, layer) for layer in engine.program.routing_columns}
        self.top_k = {layer: part.router.top_k for layer, part in parts.items()}
        self._ends = np.cumsum([0, *(part.num_experts for part in parts.values())]).tolist()
        self._tally = engine.program.choice_tally()
        self.add: Callable[[], None] = self._tally.hear

    def clear(self) -> None:
        """Begin again."""
        self._tally.clear()

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps that were counted."""
        return self._read()[0]

    def by_layer(self) -> dict[int, np.ndarray]:
        """Copies of the counts, int64 [E]."""
        _, counts_N, _ = self._read()
        parts = [counts_N[start:end] for start, end in pairwise(self._ends)]
        return dict(zip(self.top_k, parts, strict=True))

    def distinct(self) -> dict[int, int]:
        """How many experts each step had work for, added up, by layer."""
        return dict(zip(self.top_k, self._read()[2].tolist(), strict=True))

    def _read(self) -> tuple[int, np.ndarray, np.ndarray]:
        """The number of tokens, counts_N and distinct_L."""
        counts_N, distinct_L = np.empty(self._ends[-1], np.int64), np.empty(len(self.top_k), np.int64)
        return self._tally.read(counts_N, distinct_L), counts_N, distinct_L


def _moe(engine: Engine, layer: int) -> MoeConfig:
    part = engine.config.layers[layer].feed_forward
    assert isinstance(part, MoeConfig)
    return part
