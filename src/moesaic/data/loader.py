"""Batches of packed tokens, each a pure function of (packed text, settings, seed, number). numpy only.

B batch, S sequence, D domains. A window is S + 1 neighbouring tokens of one domain: S inputs and, one further, S
targets.
"""

import bisect
import functools
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moesaic.data.mixture import Mixture, Weights, weights_of, weights_of_epochs
from moesaic.data.packed import Packed, PackedDomain, ShardedTokens, document_ids, document_starts
from moesaic.errors import DataError


class Batch(NamedTuple):
    """One step's data, int64: targets are the inputs one token further; `domain_ids_B` index `Packed.names`.

    `document_ids_BS` counts the documents of a row from 0: a new one begins at each input that is an eos; -1 is
    padding, of which there is none in batches made here.
    """

    inputs_BS: np.ndarray
    targets_BS: np.ndarray
    domain_ids_B: np.ndarray
    document_ids_BS: np.ndarray

    @property
    def mask_BS(self) -> np.ndarray | None:
        """True where there is a token; None when that is everywhere."""
        mask_BS = self.document_ids_BS >= 0
        return None if mask_BS.all() else mask_BS


class _Order(NamedTuple):
    """How a domain is gone through once: which window comes when, and where its first one begins."""

    windows: np.ndarray
    phase: int


class Batches:
    """Batches of training windows: resuming needs no state but the number of the next one, twins see the same.

    A domain's windows are dealt without replacement, in a new order every time they are used up (its epoch). Fewer than
    S targets at its ends fit no window; which ones changes with the epoch.

    weights: "proportional" to tokens, "uniform", or domain -> weight (a missing domain has weight 0).
    epochs: domain -> how often all `num_batches` batches go through it, instead of weights (a missing domain: never).
    Raises DataError when there are fewer windows than one batch needs, or when epochs and run do not fit.
    """

    def __init__(
        self,
        packed: Packed,
        batch_size: int,
        sequence_length: int,
        seed: int,
        weights: Weights = "proportional",
        *,
        epochs: Mapping[str, float] | None = None,
        num_batches: int | None = None,
    ) -> None:
        if batch_size < 1 or sequence_length < 1:
            raise DataError(f"batch_size={batch_size}, sequence_length={sequence_length}; both must be 1 or more")
        self.packed, self.batch_size, self.sequence_length, self.seed = packed, batch_size, sequence_length, seed
        self.num_windows = tuple(domain.num_windows(sequence_length) for domain in packed.domains)
        self._mixture = Mixture(self._weights(weights, epochs, num_batches), seed)
        self._check_sizes()
        self._order = functools.lru_cache(maxsize=2 * len(packed.domains))(self._shuffled_windows)
        self._tokens = _Tokens(packed)

    @property
    def tokens_per_batch(self) -> int:
        """Targets of a batch."""
        return self.batch_size * self.sequence_length

    @property
    def shares(self) -> dict[str, float]:
        """The part of all samples that comes from each domain."""
        return dict(zip(self.packed.names, self._mixture.shares_D.tolist(), strict=True))

    def batch(self, number: int) -> Batch:
        """The batch of this number, counted from 0."""
        domains_B, dealt_B = self._mixture.samples(number * self.batch_size, self.batch_size)
        first_B = np.array([self._place(*sample) for sample in zip(domains_B.tolist(), dealt_B.tolist(), strict=True)])
        windows = self._tokens.windows(first_B, self.sequence_length + 1)
        ids_BS = document_ids(self._tokens.document_starts, first_B, self.sequence_length)
        return Batch(windows[:, :-1], windows[:, 1:], domains_B, ids_BS)

    def _place(self, domain: int, dealt_before: int) -> int:
        """Where a window begins, in the tokens of all domains."""
        epoch, place = divmod(dealt_before, self.num_windows[domain])
        order = self._order(domain, epoch)
        return self._tokens.domain_begins[domain] + order.phase + int(order.windows[place]) * self.sequence_length

    def _shuffled_windows(self, domain: int, epoch: int) -> _Order:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, 1, domain, epoch))))
        windows = generator.permutation(np.arange(self.num_windows[domain], dtype=np.uint32))
        unused = (len(self.packed.domains[domain].train) - 1) % self.sequence_length
        return _Order(windows, int(generator.integers(unused + 1)))

    def _weights(self, weights: Weights, epochs: Mapping[str, float] | None, num_batches: int | None) -> list[float]:
        names = self.packed.names
        if epochs is None:
            return weights_of(names, [len(domain.train) for domain in self.packed.domains], weights)
        if num_batches is None or weights != "proportional":
            raise DataError("epochs say everything about the shares, given num_batches; leave out the weights")
        return weights_of_epochs(names, self.num_windows, epochs, num_batches * self.batch_size, self.sequence_length)

    def _check_sizes(self) -> None:
        used = np.flatnonzero(self._mixture.shares_D)
        for domain in used:
            if not self.num_windows[domain]:
                packed = self.packed.domains[domain]
                raise DataError(
                    f"domain {packed.name!r} has {len(packed.train)} training tokens, fewer than one window of "
                    f"{self.sequence_length + 1}; give it more text or use a shorter sequence"
                )
        total = sum(self.num_windows[domain] for domain in used)
        if total < self.batch_size:
            raise DataError(
                f"the training text makes {total} windows of {self.sequence_length} tokens, fewer than one batch of "
                f"{self.batch_size}; give more text, or use a smaller batch or a shorter sequence"
            )


class _Tokens:
    """The training tokens of all domains, one after another, as they lie in their shards."""

    def __init__(self, packed: Packed) -> None:
        self._shards = [shard for domain in packed.domains for shard in _shards(domain)]
        self._begins = [0, *itertools.accumulate(map(len, self._shards))]
        lengths = [len(domain.train) for domain in packed.domains]
        self.domain_begins = [0, *itertools.accumulate(lengths)][:-1]
        starts = [document_starts(d.train, d.train_starts, packed.eos_id) for d in packed.domains]
        self.document_starts = np.concatenate(
            [begin + piece for begin, piece in zip(self.domain_begins, starts, strict=True)]
        )

    def windows(self, first_B: np.ndarray, length: int) -> np.ndarray:
        """[B, length] tokens from each place on, int64."""
        windows = np.empty((len(first_B), length), dtype=np.int64)
        for window, first in zip(windows, first_B.tolist(), strict=True):
            self._copy(first, window)
        return windows

    def _copy(self, first: int, window: np.ndarray) -> None:
        shard = bisect.bisect_right(self._begins, first) - 1
        filled = 0
        while filled < len(window):  # a second time only where a shard ends within the window
            begin = first + filled - self._begins[shard]
            piece = self._shards[shard][begin : begin + len(window) - filled]
            window[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1


def _shards(domain: PackedDomain) -> tuple[np.ndarray, ...]:
    return domain.train.shards if isinstance(domain.train, ShardedTokens) else (domain.train,)
