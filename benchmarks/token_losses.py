"""The loss of every held-out token, of a model and of the engine on the same windows, so that two can be compared.

N scored tokens, W windows, B batch, S sequence, V vocab.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moesaic import Engine
from moesaic.data.held_out import HeldOutBatch, held_out_windows
from moesaic.data.packed import Packed
from moesaic.engine.cache import Text
from moesaic.engine.engine import Piece
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingTape


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float


class Losses(NamedTuple):
    """In nats. window_N: which window each token is of, from 0."""

    nats_N: Tensor
    window_N: Tensor
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Of the text as a whole: domains count by their bytes."""
        return self.nats_N.sum().item() / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_N.mean().item())

    def more_than(self, other: "Losses") -> Estimate:
        """Bits per byte above another's on the same tokens; the error is that of the windows' paired differences."""
        more_W = torch.zeros(int(self.window_N.max()) + 1, dtype=torch.float64)
        more_W.index_add_(0, self.window_N, self.nats_N - other.nats_N)
        scale = len(more_W) / math.log(2) / self.num_bytes
        return Estimate(more_W.mean().item() * scale, more_W.std().item() / math.sqrt(len(more_W)) * scale)


def held_out(packed: Packed, sequence_length: int, max_tokens: int) -> list[HeldOutBatch]:
    """Windows of all domains, at most `max_tokens` tokens of each."""
    windows = held_out_windows(packed, sequence_length, max_tokens, batch_size=max(1, 4096 // sequence_length))
    return [batch for of_domain in windows.values() for batch in of_domain]


def run(model: Decoder, batch: HeldOutBatch, tape: RoutingTape | None = None) -> Tensor:
    """Logits [B, S, V]; tokens see their own document. Padding stands at the end, where causality hides it."""
    inputs, documents = torch.from_numpy(batch.inputs_BS), torch.from_numpy(batch.document_ids_BS)
    return model(inputs, tape=tape, document_ids_BS=documents)


@torch.no_grad()
def model_losses(model: Decoder, batches: list[HeldOutBatch]) -> Losses:
    """Of a model in evaluation mode."""
    return _losses(batches, (run(model, batch)[torch.from_numpy(batch.mask_BS)] for batch in batches))


def engine_losses(engine: Engine, batches: list[HeldOutBatch]) -> Losses:
    """Of the engine. Each document of a window is a text by itself: rotations only know distances."""
    return _losses(batches, (torch.cat(list(_window_logits(engine, batch))) for batch in batches))


def _window_logits(engine: Engine, batch: HeldOutBatch) -> Iterator[Tensor]:
    for ids_S, documents_S, mask_S in zip(batch.inputs_BS, batch.document_ids_BS, batch.mask_BS, strict=True):
        ids, documents = ids_S[mask_S], documents_S[mask_S]
        cuts = np.flatnonzero(np.diff(documents)) + 1
        pieces = [Piece(Text(), part.tolist(), "all") for part in np.split(ids, cuts)]
        yield engine.step(pieces).clone()
        for piece in pieces:
            engine.free(piece.text)


def _losses(batches: list[HeldOutBatch], logits_NV: Iterator[Tensor]) -> Losses:
    """From the logits of each batch's scored tokens, window by window."""
    nats, windows, first = [], [], 0
    for batch, scored_NV in zip(batches, logits_NV, strict=True):
        targets_N = torch.from_numpy(batch.targets_BS[batch.mask_BS])
        nats.append(cross_entropy(scored_NV.float(), targets_N, reduction="none").double())
        windows.append(torch.from_numpy(first + np.nonzero(batch.mask_BS)[0]))
        first += len(batch.mask_BS)
    return Losses(torch.cat(nats), torch.cat(windows), sum(batch.num_bytes for batch in batches))
