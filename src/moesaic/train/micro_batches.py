"""A step's micro-batches: as tensors, and how much of the step each of them is.

B batch, S sequence, M source.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.data.loader import Batch
from moesaic.data.sourced import IGNORED_TARGET, SourcedBatch
from moesaic.errors import ConfigError
from moesaic.parallel import Ranks

IGNORED = IGNORED_TARGET
AnyBatch = Batch | SourcedBatch


class Source(NamedTuple):
    """What an encoder reads, by the names that `EncoderDecoder.hidden` has for it."""

    source_ids_BM: Tensor
    source_mask_BM: Tensor | None


class BatchTensors(NamedTuple):
    """A batch as the model takes it; targets at padding do not count. source: for encoder-decoders."""

    inputs_BS: Tensor
    targets_BS: Tensor
    mask_BS: Tensor | None
    document_ids_BS: Tensor | None
    source: Source | None = None

    @property
    def beside(self) -> dict[str, Tensor | None]:
        """What the model's `hidden` takes beside inputs and mask."""
        return {"document_ids_BS": self.document_ids_BS} if self.source is None else self.source._asdict()


def tensors_of(batch: AnyBatch, document_attention: bool, device: torch.device | str = "cpu") -> BatchTensors:
    """The batch on a device (the CPU: in the same memory), with its documents where tokens see only their own."""

    def tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    inputs_BS, targets_BS = tensor(batch.inputs_BS), tensor(batch.targets_BS)
    source, documents_BS = None, None
    if isinstance(batch, SourcedBatch):  # a row is one document
        mask_BM = None if batch.source_mask_BM.all() else tensor(batch.source_mask_BM)
        source = Source(tensor(batch.source_ids_BM), mask_BM)
    elif document_attention:
        documents_BS = tensor(batch.document_ids_BS)
    if batch.mask_BS is None:
        return BatchTensors(inputs_BS, targets_BS, None, documents_BS, source)
    mask_BS = tensor(batch.mask_BS)
    return BatchTensors(inputs_BS, targets_BS.masked_fill(~mask_BS, IGNORED), mask_BS, documents_BS, source)


class Share(NamedTuple):
    """The part of a step's targets, and of the tokens of decoder and encoder, that is in one micro-batch.

    Padding is in no part. step_tokens: how many tokens the whole step reads, decoder and encoder together.
    """

    targets: float
    tokens: float
    source_tokens: float
    step_tokens: int

    def by_layer(self, config: ModelConfig) -> list[float]:
        """The part of the step's tokens that each layer sees, by the number of the layer."""
        num_encoding = len(config.encoder.layers) if config.encoder else 0
        return [self.source_tokens] * num_encoding + [self.tokens] * (len(config.every_layer) - num_encoding)


def shares_of(micro_batches: Sequence[AnyBatch], ranks: Ranks) -> list[Share]:
    """The shares of this rank's micro-batches. Raises ConfigError, on every rank, when they have different numbers."""
    sizes = [_size(batch) for batch in micro_batches]
    everywhere = ranks.gather(sizes)
    if len({len(theirs) for theirs in everywhere}) > 1:
        numbers = ", ".join(str(len(theirs)) for theirs in everywhere)
        raise ConfigError(f"ranks with {numbers} micro-batches; give every rank the same number")
    whole = [sum(part) for part in zip(*(size for theirs in everywhere for size in theirs), strict=True)]
    _, tokens, source_tokens = whole
    parts = ([part / max(1, total) for part, total in zip(size, whole, strict=True)] for size in sizes)
    return [Share(*part, step_tokens=tokens + source_tokens) for part in parts]


def _size(batch: AnyBatch) -> tuple[int, int, int]:
    """The targets, the tokens and the tokens of sources that count."""
    counts_BS, mask_BS = batch.targets_BS >= 0, batch.mask_BS
    source_tokens = int(batch.source_mask_BM.sum()) if isinstance(batch, SourcedBatch) else 0
    if mask_BS is None:
        return int(counts_BS.sum()), batch.inputs_BS.size, source_tokens
    return int((mask_BS & counts_BS).sum()), int(mask_BS.sum()), source_tokens
