"""A step's micro-batches: as tensors, and how much of the step each of them is.

B batch, S sequence.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.data.loader import Batch
from moesaic.errors import ConfigError
from moesaic.parallel import Ranks

IGNORED = -100  # a target that does not count, as torch.nn.functional.cross_entropy has it


class BatchTensors(NamedTuple):
    """A batch as the model takes it; targets at padding do not count."""

    inputs_BS: Tensor
    targets_BS: Tensor
    mask_BS: Tensor | None
    document_ids_BS: Tensor | None


def tensors_of(batch: Batch, document_attention: bool) -> BatchTensors:
    """The batch in the same memory, with its documents where tokens see only their own."""
    inputs_BS, targets_BS = torch.from_numpy(batch.inputs_BS), torch.from_numpy(batch.targets_BS)
    documents_BS = torch.from_numpy(batch.document_ids_BS) if document_attention else None
    if batch.mask_BS is None:
        return BatchTensors(inputs_BS, targets_BS, None, documents_BS)
    mask_BS = torch.from_numpy(batch.mask_BS)
    return BatchTensors(inputs_BS, targets_BS.masked_fill(~mask_BS, IGNORED), mask_BS, documents_BS)


class Share(NamedTuple):
    """The part of a step's targets, and of its tokens, that is in one micro-batch; padding is in no part."""

    targets: float
    tokens: float


def shares_of(micro_batches: Sequence[Batch], ranks: Ranks) -> list[Share]:
    """The shares of this rank's micro-batches. Raises ConfigError, on every rank, when they have different numbers."""
    sizes = [_size(batch) for batch in micro_batches]
    everywhere = ranks.gather(sizes)
    if len({len(theirs) for theirs in everywhere}) > 1:
        numbers = ", ".join(str(len(theirs)) for theirs in everywhere)
        raise ConfigError(f"ranks with {numbers} micro-batches; give every rank the same number")
    targets, tokens = (sum(part) for part in zip(*(size for theirs in everywhere for size in theirs), strict=True))
    return [Share(t / max(1, targets), n / max(1, tokens)) for t, n in sizes]


def _size(batch: Batch) -> tuple[int, int]:
    """The targets and the tokens that count."""
    counts_BS, mask_BS = batch.targets_BS >= 0, batch.mask_BS
    if mask_BS is None:
        return int(counts_BS.sum()), batch.inputs_BS.size
    return int((mask_BS & counts_BS).sum()), int(mask_BS.sum())
