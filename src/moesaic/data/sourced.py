"""Batches for encoder-decoders: a source that is read whole, and a target to be written after it.

B batch, S length of the targets, M length of the sources.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

IGNORED_TARGET = -100  # a target that does not count, as torch.nn.functional.cross_entropy has it


class Example(NamedTuple):
    """One source and its target, special tokens included. given: how many of the target's first tokens are not
    scored, for they are handed to the model: a language to write in, say."""

    source_ids: Sequence[int] | np.ndarray
    target_ids: Sequence[int] | np.ndarray
    given: int = 0


class SourcedBatch(NamedTuple):
    """One step's data, int64. `inputs_BS` are what the decoder reads: a start token, then the targets but the last.

    Targets that do not count are IGNORED_TARGET. `domain_ids_B` index the names of the data. In `document_ids_BS`
    tokens are 0 and padding is -1; `source_mask_BM` is true where the source has a token.
    """

    inputs_BS: np.ndarray
    targets_BS: np.ndarray
    domain_ids_B: np.ndarray
    document_ids_BS: np.ndarray
    source_ids_BM: np.ndarray
    source_mask_BM: np.ndarray

    @property
    def mask_BS(self) -> np.ndarray | None:
        """True where there is a token; None when that is everywhere."""
        mask_BS = self.document_ids_BS >= 0
        return None if mask_BS.all() else mask_BS


def collate(examples: Sequence[Example], domain_ids_B: np.ndarray, *, start_id: int, pad_id: int) -> SourcedBatch:
    """Examples side by side, padded at the end to the longest source and the longest target.

    start_id: what the decoder reads first. pad_id: what stands where there is no token, and counts nowhere.
    """
    sources_BM, source_mask_BM = _padded([example.source_ids for example in examples], pad_id)
    ids_BS, mask_BS = _padded([example.target_ids for example in examples], pad_id)
    starts_B1 = np.full((len(examples), 1), start_id, dtype=np.int64)
    inputs_BS = np.where(mask_BS, np.concatenate([starts_B1, ids_BS[:, :-1]], axis=1), pad_id)
    given_B1 = np.array([[example.given] for example in examples])
    is_scored_BS = mask_BS & (np.arange(ids_BS.shape[1]) >= given_B1)
    return SourcedBatch(
        inputs_BS,
        np.where(is_scored_BS, ids_BS, IGNORED_TARGET),
        domain_ids_B,
        np.where(mask_BS, 0, -1),
        sources_BM,
        source_mask_BM,
    )


def with_others_sources(batch: SourcedBatch) -> SourcedBatch:
    """The same targets after the wrong sources: each row gets its neighbour's. One row alone keeps its own.

    What a model loses by this says how much it reads in the source.
    """
    return batch._replace(
        source_ids_BM=np.roll(batch.source_ids_BM, 1, axis=0), source_mask_BM=np.roll(batch.source_mask_BM, 1, axis=0)
    )


def _padded(rows: Sequence[Sequence[int] | np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    lengths_B = np.array([len(row) for row in rows])
    mask = np.arange(lengths_B.max()) < lengths_B[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return ids, mask
