"""Packed tokens and the batches made of them. numpy only; token ids come out as int64.

B batch, S sequence, V vocab. A window is S + 1 neighbouring tokens of one domain: S inputs and, one further, S targets.
"""

import functools
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from moesaic.data.corpus import Corpus, Progress
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError, RunFolderError

Weights = Mapping[str, float] | Literal["proportional", "uniform"]

FORMAT = "1"  # of the packed files; part of their names
DECK_SIZE = 1024  # samples dealt before the domains' shares are exact again


@dataclass(frozen=True, kw_only=True)
class PackedDomain:
    """A domain's token ids, documents in a row: eos, document, eos, document, ..., eos.

    Every token but the first is a target once, so the eos before a document lets its first token be one.
    """

    name: str
    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int

    def num_windows(self, sequence_length: int) -> int:
        """Training windows that do not share a target."""
        return max(0, len(self.train) - 1) // sequence_length


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A corpus as tokens of one tokenizer. `byte_lengths` [V] are the text bytes of each token (eos: 0)."""

    domains: tuple[PackedDomain, ...]
    byte_lengths: np.ndarray
    eos_id: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains)

    @property
    def num_train_tokens(self) -> int:
        return sum(len(domain.train) for domain in self.domains)


def pack(
    corpus: Corpus, tokenizer: Tokenizer, folder: str | Path | None = None, *, progress: Progress | None = None
) -> Packed:
    """Tokenize a corpus; with `folder`, keep the result there and read it the next time.

    Raises DataError when the tokenizer has no eos token or is not byte-level, RunFolderError when `folder` cannot be
    written.
    """
    if tokenizer.eos_id is None:
        raise DataError("the tokenizer has no eos token to put between documents; name one in tokenizer_config.json")
    byte_lengths = tokenizer.byte_lengths
    path = Path(folder) / f"packed-{_packed_key(corpus, tokenizer)}.npz" if folder else None
    arrays = _read_arrays(path, corpus)
    if arrays is None:
        arrays = _pack_arrays(corpus, tokenizer, progress)
        if path:
            _write_arrays(path, arrays)
    domains = [
        PackedDomain(
            name=name,
            train=arrays[f"train/{name}"],
            held_out=arrays[f"held_out/{name}"],
            held_out_bytes=int(byte_lengths[arrays[f"held_out/{name}"]].sum()),
        )
        for name in corpus.names
    ]
    return Packed(domains=tuple(domains), byte_lengths=byte_lengths, eos_id=tokenizer.eos_id)


def _packed_key(corpus: Corpus, tokenizer: Tokenizer) -> str:
    return hashlib.sha256(f"{FORMAT} {corpus.digest} {tokenizer.digest}".encode()).hexdigest()[:24]


def _pack_arrays(corpus: Corpus, tokenizer: Tokenizer, progress: Progress | None) -> dict[str, np.ndarray]:
    arrays = {}
    for domain in corpus.domains:
        if progress:
            progress(f"tokenizing {domain.name}")
        arrays[f"train/{domain.name}"] = _pack_documents(domain.train, tokenizer)
        arrays[f"held_out/{domain.name}"] = _pack_documents(domain.held_out, tokenizer)
    return arrays


def _pack_documents(documents: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    eos = np.array([tokenizer.eos_id], dtype=dtype)
    pieces = [eos]
    for start in range(0, len(documents), 256):  # lists of Python ints are large: only a few at a time
        for token_ids in tokenizer.encode_batch(documents[start : start + 256]):
            pieces += [np.array(token_ids, dtype=dtype), eos]
    return np.concatenate(pieces)


def _read_arrays(path: Path | None, corpus: Corpus) -> dict[str, np.ndarray] | None:
    """What an earlier run kept, or nothing if that cannot be read whole: it is only a copy and is made again."""
    if path is None or not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            keys = [f"{part}/{name}" for part in ("train", "held_out") for name in corpus.names]
            return {key: arrays[key] for key in keys}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write beside and then move, so that a half file never has the final name."""
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            scratch = file.name
            with zipfile.ZipFile(file, "w") as archive:
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
        os.replace(scratch, path)
    except OSError as error:
        if scratch:
            Path(scratch).unlink(missing_ok=True)
        raise RunFolderError(
            f"cannot write {path}: {error.strerror or error}; free some space or set MOESAIC_CACHE to another folder"
        ) from error


class Batch(NamedTuple):
    """One step's data: targets are the inputs one token further; `domain_ids_B` index `Packed.names`."""

    inputs_BS: np.ndarray
    targets_BS: np.ndarray
    domain_ids_B: np.ndarray


class Batches:
    """Batches of training windows, each a pure function of (seed, step): resuming needs no state, twins see the same.

    Samples are dealt in decks: each deck holds every domain in its share, shuffled. A domain's windows are dealt
    without replacement, in a new order every time they are used up (its epoch).

    weights: "proportional" to tokens, "uniform", or domain -> weight (a missing domain has weight 0).
    Raises DataError when there are fewer windows than one batch needs.
    """

    def __init__(
        self, packed: Packed, batch_size: int, sequence_length: int, seed: int, weights: Weights = "proportional"
    ) -> None:
        if batch_size < 1 or sequence_length < 1:
            raise DataError(f"batch_size={batch_size}, sequence_length={sequence_length}; both must be 1 or more")
        self.packed, self.batch_size, self.sequence_length, self.seed = packed, batch_size, sequence_length, seed
        self.num_windows = tuple(domain.num_windows(sequence_length) for domain in packed.domains)
        self.deck_counts = _deck_counts(_weights_of(packed, weights))
        self._check_sizes()
        self._deck = functools.lru_cache(maxsize=2)(self._shuffled_deck)
        self._order = functools.lru_cache(maxsize=2 * len(packed.domains))(self._shuffled_windows)

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.sequence_length

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        samples = [self._sample(step * self.batch_size + row) for row in range(self.batch_size)]
        windows = np.stack([self._window(domain, window) for domain, window in samples]).astype(np.int64)
        domain_ids = np.array([domain for domain, _ in samples], dtype=np.int64)
        return Batch(windows[:, :-1], windows[:, 1:], domain_ids)

    def _sample(self, number: int) -> tuple[int, int]:
        """The domain and window of the sample with this number since the start of training."""
        deck_number, position = divmod(number, DECK_SIZE)
        domains, ranks = self._deck(deck_number)
        domain = int(domains[position])
        dealt_before = deck_number * self.deck_counts[domain] + int(ranks[position])
        epoch, place = divmod(dealt_before, self.num_windows[domain])
        return domain, int(self._order(domain, epoch)[place])

    def _window(self, domain: int, window: int) -> np.ndarray:
        start = window * self.sequence_length
        return self.packed.domains[domain].train[start : start + self.sequence_length + 1]

    def _shuffled_deck(self, deck_number: int) -> tuple[np.ndarray, np.ndarray]:
        """The domain of each place in a deck, and how many of that domain lie before it in the deck."""
        sorted_deck = np.repeat(np.arange(len(self.deck_counts)), self.deck_counts)
        domains = self._generator(0, deck_number).permutation(sorted_deck)
        ranks = np.zeros(DECK_SIZE, dtype=np.int64)
        for domain, count in enumerate(self.deck_counts):
            ranks[domains == domain] = np.arange(count)
        return domains, ranks

    def _shuffled_windows(self, domain: int, epoch: int) -> np.ndarray:
        return self._generator(1, domain, epoch).permutation(self.num_windows[domain])

    def _generator(self, *what: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, *what))))

    def _check_sizes(self) -> None:
        used = [d for d, count in enumerate(self.deck_counts) if count]
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


def _weights_of(packed: Packed, weights: Weights) -> np.ndarray:
    if weights == "uniform":
        return np.ones(len(packed.domains))
    if weights == "proportional":
        return np.array([len(domain.train) for domain in packed.domains], dtype=np.float64)
    if not isinstance(weights, Mapping):
        raise DataError(f"weights={weights!r}; use 'proportional', 'uniform' or a weight for each domain")
    unknown = sorted(set(weights) - set(packed.names))
    if unknown:
        raise DataError(f"weights for unknown domain {unknown[0]!r}; known: {', '.join(packed.names)}")
    values = np.array([float(weights.get(name, 0.0)) for name in packed.names])
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise DataError(f"weights {dict(weights)}; they must be numbers of 0 or more, and one above 0")
    return values


def _deck_counts(weights: np.ndarray) -> tuple[int, ...]:
    """Places of each domain in a deck, by largest remainders; a domain of any weight gets at least one."""
    if np.count_nonzero(weights) > DECK_SIZE:
        raise DataError(f"{len(weights)} domains; at most {DECK_SIZE} can be mixed: put some together")
    exact = weights / weights.sum() * DECK_SIZE
    counts = np.maximum(np.floor(exact), weights > 0).astype(np.int64)
    while (missing := DECK_SIZE - counts.sum()) != 0:
        if missing > 0:
            counts[np.argmax(np.where(weights > 0, exact - counts, -np.inf))] += 1
        else:
            counts[np.argmin(np.where(counts > 1, exact - counts, np.inf))] -= 1
    return tuple(int(count) for count in counts)


class HeldOutBatch(NamedTuple):
    """Held-out windows in a row. Where `mask_BS` is false there is padding, not to be scored.

    `num_bytes` are the UTF-8 bytes of the text whose tokens are scored: bits per byte is bits / num_bytes.
    """

    inputs_BS: np.ndarray
    targets_BS: np.ndarray
    mask_BS: np.ndarray
    num_bytes: int


def held_out_windows(
    packed: Packed, sequence_length: int, max_tokens_per_domain: int | None = None, *, batch_size: int = 1
) -> dict[str, Iterator[HeldOutBatch]]:
    """For each domain, its held-out text in batches of up to `batch_size` windows; without a maximum every token is
    scored exactly once. With one, whole windows spread evenly over the text are taken, at least one.
    """
    return {
        domain.name: _held_out(packed, domain, sequence_length, max_tokens_per_domain, batch_size)
        for domain in packed.domains
    }


def _held_out(
    packed: Packed, domain: PackedDomain, sequence_length: int, max_tokens: int | None, batch_size: int
) -> Iterator[HeldOutBatch]:
    num_targets = len(domain.held_out) - 1
    num_windows = -(-num_targets // sequence_length)
    wanted = num_windows if max_tokens is None else min(num_windows, max(1, max_tokens // sequence_length))
    chosen = np.arange(wanted) * num_windows // max(1, wanted)
    for first in range(0, wanted, batch_size):
        starts_B1 = chosen[first : first + batch_size, None] * sequence_length
        places_BS = starts_B1 + np.arange(sequence_length)
        mask_BS = places_BS < num_targets
        places_BS = np.minimum(places_BS, num_targets - 1)
        inputs_BS = np.where(mask_BS, domain.held_out[places_BS], packed.eos_id).astype(np.int64)
        targets_BS = np.where(mask_BS, domain.held_out[places_BS + 1], packed.eos_id).astype(np.int64)
        num_bytes = int(packed.byte_lengths[targets_BS[mask_BS]].sum())
        yield HeldOutBatch(inputs_BS, targets_BS, mask_BS, num_bytes)
