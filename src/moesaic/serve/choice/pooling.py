"""One vector of a whole prompt, from what the head would read of its tokens, taken piece by piece.

T tokens, D hidden size.
"""

import numpy as np
from torch import Tensor

from moesaic.errors import GenerationError
from moesaic.serve.request import Pooled, PoolingKind


class PromptPooling:
    """The hidden state of a prompt's last token, or the mean over all of them, of length 1."""

    def __init__(self, num_tokens: int, kind: PoolingKind) -> None:
        self._num_tokens, self._kind = num_tokens, kind
        self._known = 0
        self._sum_D = np.zeros(0)

    @property
    def complete(self) -> bool:
        return self._known == self._num_tokens

    def add(self, start: int, hidden_TD: Tensor) -> None:
        """Those of the tokens from `start` on; those that were seen before are seen again after a preemption."""
        new_TD = hidden_TD[max(0, self._known - start) :].double().numpy()
        if self._kind == "last":
            self._sum_D = new_TD[-1] if len(new_TD) else self._sum_D
        else:
            # Token after token: pieces of other sizes must give the same bits.
            for hidden_D in new_TD:
                self._sum_D = self._sum_D + hidden_D if self._sum_D.size else hidden_D
        self._known = max(self._known, start + len(hidden_TD))

    def event(self) -> Pooled:
        """Raises GenerationError for states that are infinite or no numbers."""
        norm = float(np.linalg.norm(self._sum_D))
        if not np.isfinite(norm):
            raise GenerationError("hidden states that are infinite or no numbers; no vector comes of them")
        return Pooled((self._sum_D / (norm or 1.0)).astype(np.float32))
