"""Rows in token order, as a trace keeps them. T tokens, R rows, E experts."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
CHUNK = 1 << 20  # rows that are counted at a time: numpy turns them into int64 first


class TokenRows(NamedTuple):
    """One layer's rows: token t has the rows row_offsets[t] to row_offsets[t+1], its first choice first.

    row_offsets: int64 [T+1] from 0. choices_R: which of its token's choices a row is; the numbers need not be
    consecutive. weight_on: whether weights multiply the experts' outputs or inputs.
    """

    row_offsets: np.ndarray
    expert_ids_R: np.ndarray
    choices_R: np.ndarray
    weights_R: np.ndarray
    weight_on: Literal["output", "input"] = "output"

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.row_offsets) - 1

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.expert_ids_R)

    @property
    def rows_of_tokens(self) -> NDArray[np.int64]:
        """How many experts serve each token, [T]."""
        return np.diff(self.row_offsets)

    @property
    def token_ids_R(self) -> NDArray[np.int64]:
        """The token of each row."""
        return np.repeat(np.arange(self.num_tokens), self.rows_of_tokens)

    def tokens(self, first: int, last: int) -> "TokenRows":
        """The rows of tokens `first` to `last`, the last not included."""
        offsets = self.row_offsets[first : last + 1]
        rows = slice(int(offsets[0]), int(offsets[-1]))
        return TokenRows(
            row_offsets=offsets - offsets[0],
            expert_ids_R=self.expert_ids_R[rows],
            choices_R=self.choices_R[rows],
            weights_R=self.weights_R[rows],
            weight_on=self.weight_on,
        )

    def equals(self, other: "TokenRows") -> bool:
        """Whether all is the same, weights bit by bit."""
        pairs = zip(self[:4], other[:4], strict=True)
        return self.weight_on == other.weight_on and all(mine.tobytes() == its.tobytes() for mine, its in pairs)

    def counts(self, num_experts: int) -> Counts:
        """Rows of each expert, [E]."""
        counts_E = np.zeros(num_experts, dtype=np.int64)
        for first in range(0, self.num_rows, CHUNK):
            counts_E += np.bincount(self.expert_ids_R[first : first + CHUNK], minlength=num_experts)
        return counts_E


class TracedForward(NamedTuple):
    """One forward pass of T tokens: the rows of every layer that routes, and what is known of the tokens.

    chosen: what the router chose, for layers where a capacity let other rows through. mask_T: false for padding; None
    is no padding. document_ids_T: None is one document. domain_ids_T: -1 is none.
    """

    rows: Mapping[int, TokenRows]
    chosen: Mapping[int, TokenRows] = {}
    token_ids_T: np.ndarray | None = None
    mask_T: np.ndarray | None = None
    document_ids_T: np.ndarray | None = None
    domain_ids_T: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return next(iter(self.rows.values())).num_tokens
