"""Held-out text in windows to be scored. B batch, S sequence."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moesaic.data.packed import Packed, PackedDomain, document_ids, document_starts


class HeldOutBatch(NamedTuple):
    """Held-out windows in a row. Where `mask_BS` is false there is padding, not to be scored.

    `document_ids_BS` counts the documents of a row from 0. `num_bytes` are the UTF-8 bytes of the text whose tokens are
    scored: bits per byte is bits / num_bytes.
    """

    inputs_BS: np.ndarray
    targets_BS: np.ndarray
    mask_BS: np.ndarray
    document_ids_BS: np.ndarray
    num_bytes: int


def held_out_windows(
    packed: Packed, sequence_length: int, max_tokens_per_domain: int | None = None, *, batch_size: int = 1
) -> dict[str, Iterator[HeldOutBatch]]:
    """For each domain, its held-out text in batches of up to `batch_size` windows; without a maximum every token is
    scored exactly once. With one, whole windows spread evenly over the text are taken, at least one.
    """
    return {
        domain.name: _windows(packed, domain, sequence_length, max_tokens_per_domain, batch_size)
        for domain in packed.domains
    }


def _windows(
    packed: Packed, domain: PackedDomain, sequence_length: int, max_tokens: int | None, batch_size: int
) -> Iterator[HeldOutBatch]:
    num_targets = len(domain.held_out) - 1
    num_windows = -(-num_targets // sequence_length)
    wanted = num_windows if max_tokens is None else min(num_windows, max(1, max_tokens // sequence_length))
    chosen = np.arange(wanted) * num_windows // max(1, wanted)
    starts = document_starts(domain.held_out, domain.held_out_starts, packed.eos_id)
    # The eos that closes the text is no input: padding belongs to what it follows.
    starts = starts[starts < num_targets]
    for first in range(0, wanted, batch_size):
        first_B = chosen[first : first + batch_size] * sequence_length
        places_BS = first_B[:, None] + np.arange(sequence_length)
        mask_BS = places_BS < num_targets
        places_BS = np.minimum(places_BS, num_targets - 1)
        inputs_BS = np.where(mask_BS, domain.held_out[places_BS], packed.eos_id).astype(np.int64)
        targets_BS = np.where(mask_BS, domain.held_out[places_BS + 1], packed.eos_id).astype(np.int64)
        ids_BS = document_ids(starts, first_B, sequence_length)
        num_bytes = int(packed.byte_lengths[targets_BS[mask_BS]].sum())
        yield HeldOutBatch(inputs_BS, targets_BS, mask_BS, ids_BS, num_bytes)
