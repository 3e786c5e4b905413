"""A trace's rows beside what is known of their tokens: counts of one against the other.

N tokens that were routed (padding is not), R rows, E experts, X labels of some kind.
"""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moesaic.trace import Trace

Counts = NDArray[np.int64]
_CHUNK = 1 << 20  # rows that are counted at a time


class Choices:
    """What the routers of a trace chose, layer by layer, before any capacity; padding is left out.

    Raises TraceError for a trace without tokens.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace.require_tokens()
        self.kept = np.flatnonzero(trace.token_facts["mask"])
        self.num_tokens = len(self.kept)
        self._place = np.full(trace.num_tokens, -1, dtype=np.int64)
        self._place[self.kept] = np.arange(self.num_tokens)

    def fact(self, name: str) -> np.ndarray | None:
        """token_ids, domain_ids or document_ids of the tokens, [N]; None where they were not recorded."""
        values = self.trace.token_facts.get(name)
        return None if values is None else values[self.kept].astype(np.int64)

    @cached_property
    def forward_of_N(self) -> np.ndarray:
        """The forward of each token."""
        lengths = np.diff(self.trace.forward_offsets)
        return np.repeat(np.arange(len(lengths)), lengths)[self.kept]

    @cached_property
    def unit_of_N(self) -> np.ndarray:
        """The piece of text that each token belongs to, numbered from 0: a document of a forward."""
        documents = self.fact("document_ids")
        assert documents is not None, "every trace has document ids"
        return np.unique(self.forward_of_N << 32 | documents, return_inverse=True)[1].reshape(-1)

    @cached_property
    def text_starts_N(self) -> np.ndarray:
        """Whether a token is the first of its piece of text."""
        return np.append(True, np.diff(self.unit_of_N) != 0)

    @cached_property
    def next_ids_N(self) -> np.ndarray | None:
        """The token that follows each one in its text, -1 at the end; None where ids were not recorded."""
        ids = self.fact("token_ids")
        return None if ids is None else np.append(np.where(self.text_starts_N[1:], -1, ids[1:]), -1)

    def rows(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(token, expert) of each row of a layer, [R] each; a token's first choice comes first."""
        chosen = self.trace.chosen(layer)
        tokens_R = self._place[chosen.token_ids_R]
        is_kept = tokens_R >= 0
        return tokens_R[is_kept], chosen.expert_ids_R[is_kept].astype(np.int64)

    def matrix(self, layer: int) -> np.ndarray:
        """The experts of each token, [N, M], its first choice first; -1 where a token has no such choice."""
        tokens_R, experts_R = self.rows(layer)
        counts_N = np.bincount(tokens_R, minlength=self.num_tokens)
        first_N = np.cumsum(counts_N) - counts_N
        choices_NM = np.full((self.num_tokens, int(counts_N.max(initial=0))), -1, dtype=np.int64)
        choices_NM[tokens_R, np.arange(len(tokens_R)) - first_N[tokens_R]] = experts_R
        return choices_NM

    def crossed(self, layer: int, labels_N: np.ndarray, num_labels: int) -> Counts:
        """Rows of tokens of each label at each expert, [X, E]. A label of -1 is none."""
        tokens_R, experts_R = self.rows(layer)
        return cross(labels_N, num_labels, tokens_R, experts_R, self.trace.fingerprint.num_experts[layer])


def cross(
    labels_N: np.ndarray, num_labels: int, tokens_R: np.ndarray, experts_R: np.ndarray, num_experts: int
) -> Counts:
    """Rows of each label at each expert, [X, E], counted in pieces."""
    counts = np.zeros(num_labels * num_experts, dtype=np.int64)
    for first in range(0, len(tokens_R), _CHUNK):
        labels_R = labels_N[tokens_R[first : first + _CHUNK]]
        cells_R = (labels_R * num_experts + experts_R[first : first + _CHUNK])[labels_R >= 0]
        counts += np.bincount(cells_R, minlength=len(counts))
    return counts.reshape(num_labels, num_experts)
