"""Log probabilities of a prompt's own tokens, taken piece by piece, so that never many rows of logits are in memory.

N rows, V vocab.
"""

from collections.abc import Sequence

import numpy as np

from moesaic.engine.program import Program
from moesaic.serve.choice.choosing import scored
from moesaic.serve.request import PromptScored, TokenInfo

_LOGITS = 2**24  # 64 MiB of fp32


class PromptScores:
    """Each token of a prompt under the model, given those before it; of the first there is none."""

    def __init__(self, prompt_ids: Sequence[int], count: int) -> None:
        self._prompt_ids, self._count = prompt_ids, count
        self._tokens = [TokenInfo(prompt_ids[0])]

    @property
    def complete(self) -> bool:
        return len(self._tokens) == len(self._prompt_ids)

    def add(self, start: int, logits_NV: np.ndarray, program: Program | None = None) -> None:
        """Rows of the tokens from `start` on; those that were seen before are seen again after a preemption."""
        known = len(self._tokens)
        rows_V = list(logits_NV[known - 1 - start : len(self._prompt_ids) - 1 - start])
        token_ids = self._prompt_ids[known : known + len(rows_V)]
        self._tokens += scored(rows_V, token_ids, [self._count] * len(rows_V), program)

    def event(self) -> PromptScored:
        return PromptScored(tuple(self._tokens))


def rows_at_once(vocab_size: int) -> int:
    """How many rows of logits may be in memory together."""
    return max(8, _LOGITS // vocab_size)
