"""Batches of translations, each a pure function of (texts, settings, seed, number). numpy only.

    source   <|en|> the cat sat eos
    decoder  start <|fr|> le chat était assis      (what it reads)
    target         <|fr|> le chat était assis eos  (what it writes; the language is given and not scored)

Source: NLLB, arXiv:2207.04672, section 6 (the language tokens); the lengths of a batch are alike, as in every trainer.

B batch, S length of the targets, M length of the sources.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moesaic.data.mixture import Mixture, Weights, weights_of, weights_of_epochs
from moesaic.data.pairs import Direction, PairCorpus
from moesaic.data.pieces import ids_dtype
from moesaic.data.sourced import Example, SourcedBatch, collate
from moesaic.data.special_tokens import language_token
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError

SPECIAL_TOKENS = 2  # around a text: its language and eos
POOL_BATCHES = 32  # as many batches are sorted by length together

_ENCODED_AT_ONCE = 1024


class Texts(NamedTuple):
    """One language's texts in a row: text n is `ids[offsets[n]:offsets[n + 1]]`, empty where there is none."""

    ids: np.ndarray
    offsets: np.ndarray

    def text(self, number: int) -> np.ndarray:
        """The tokens of text `number`."""
        return self.ids[self.offsets[number] : self.offsets[number + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text."""
        return np.diff(self.offsets)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """A PairCorpus as tokens. texts: by language, numbered as the segments are.

    train, held_out: the segments that are translated in each direction; the same directions in the same order.
    language_ids: the special token of each language. byte_lengths [V]: the text bytes of each token.
    """

    texts: dict[str, Texts]
    train: dict[Direction, np.ndarray]
    held_out: dict[Direction, np.ndarray]
    language_ids: dict[str, int]
    byte_lengths: np.ndarray
    eos_id: int
    digest: str = ""

    @property
    def num_train_pairs(self) -> int:
        """Pairs to train on, all directions together."""
        return sum(map(len, self.train.values()))

    @classmethod
    def of(cls, corpus: PairCorpus, tokenizer: Tokenizer) -> "Pairs":
        """Tokenize a corpus. Raises DataError when the tokenizer has no eos token, or none for a language."""
        if tokenizer.eos_id is None:
            raise DataError("the tokenizer has no eos token to end texts with; name one in tokenizer_config.json")
        directions = sorted({direction for segment in corpus.segments for direction in segment.directions})
        return cls(
            texts={language: _tokenized(corpus, tokenizer, language) for language in corpus.languages},
            train={direction: _numbers(corpus, direction, held_out=False) for direction in directions},
            held_out={direction: _numbers(corpus, direction, held_out=True) for direction in directions},
            language_ids={language: _language_id(tokenizer, language) for language in corpus.languages},
            byte_lengths=tokenizer.byte_lengths,
            eos_id=tokenizer.eos_id,
            digest=hashlib.sha256(f"{corpus.digest} {tokenizer.digest}".encode()).hexdigest(),
        )

    def lengths(self, direction: Direction, numbers: np.ndarray) -> np.ndarray:
        """Tokens of sources and targets, [segments, 2], special tokens included."""
        languages = (direction.source, direction.target)
        return np.stack([self.texts[language].lengths[numbers] for language in languages], axis=1) + SPECIAL_TOKENS

    def example(self, direction: Direction, number: int) -> Example:
        """One segment, to be translated in one direction."""
        source, target = (
            np.concatenate([[self.language_ids[language]], self.texts[language].text(number), [self.eos_id]])
            for language in (direction.source, direction.target)
        )
        return Example(source, target, given=1)

    def fitting(self, numbers: Mapping[Direction, np.ndarray], most_tokens: int) -> dict[Direction, np.ndarray]:
        """Those whose source and target have at most `most_tokens`, special tokens included."""
        return {
            direction: found[(self.lengths(direction, found) <= most_tokens).all(axis=1)]
            for direction, found in numbers.items()
        }


class PairBatches:
    """Batches of pairs: resuming needs no state but the number of the next one.

    A direction's pairs are dealt without replacement, in a new order every time they are used up (its epoch). Of every
    POOL_BATCHES batches the pairs are sorted by length, which leaves little padding; the batches come in random order.

    most_tokens: of a source or target, special tokens included; longer pairs are left out. start_id: what the decoder
    reads first. weights: of directions by name, "proportional" to their target tokens, or "uniform". epochs: direction
    -> how often all `num_batches` batches go through it, instead of weights.
    Raises DataError when no pair is left, and when epochs and run do not fit.
    """

    def __init__(
        self,
        pairs: Pairs,
        batch_size: int,
        most_tokens: int,
        seed: int,
        start_id: int,
        weights: Weights = "proportional",
        *,
        epochs: Mapping[str, float] | None = None,
        num_batches: int | None = None,
    ) -> None:
        self.pairs, self.batch_size, self.seed, self.start_id = pairs, batch_size, seed, start_id
        fitting = pairs.fitting(pairs.train, most_tokens)
        self.num_left_out = pairs.num_train_pairs - sum(map(len, fitting.values()))
        self.fitting = {direction: numbers for direction, numbers in fitting.items() if len(numbers)}
        if not self.fitting:
            raise DataError(
                f"none of {pairs.num_train_pairs} pairs has at most {most_tokens} tokens; use a longer sequence"
            )
        self.directions = tuple(self.fitting)
        self._mixture = Mixture(self._weights(weights, epochs, num_batches), seed)
        self._order = functools.lru_cache(maxsize=2 * len(self.directions))(self._shuffled)
        self._pool = functools.lru_cache(maxsize=2)(self._sorted_pool)

    @property
    def names(self) -> tuple[str, ...]:
        """The directions, as `domain_ids_B` count them."""
        return tuple(direction.name for direction in self.directions)

    @property
    def shares(self) -> dict[str, float]:
        """The part of all pairs that comes from each direction."""
        return dict(zip(self.names, self._mixture.shares_D.tolist(), strict=True))

    def batch(self, number: int) -> SourcedBatch:
        """The batch of this number, counted from 0."""
        pool, place = divmod(number, POOL_BATCHES)
        domains_B, numbers_B = self._pool(pool)[place]
        return _batch(self.pairs, self.directions, domains_B, numbers_B, self.start_id)

    def _sorted_pool(self, pool: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each batch the directions, and the numbers of the segments."""
        count = POOL_BATCHES * self.batch_size
        domains, dealt = self._mixture.samples(pool * count, count)
        numbers = np.array([self._number(*sample) for sample in zip(domains.tolist(), dealt.tolist(), strict=True)])
        lengths = np.zeros(count, dtype=np.int64)
        for domain, direction in enumerate(self.directions):
            lengths[domains == domain] = self.pairs.lengths(direction, numbers[domains == domain]).sum(axis=1)
        generator = self._generator(4, pool)
        by_length = np.split(np.argsort(lengths, kind="stable"), POOL_BATCHES)
        return [(domains[by_length[i]], numbers[by_length[i]]) for i in generator.permutation(POOL_BATCHES)]

    def _number(self, domain: int, dealt_before: int) -> int:
        epoch, place = divmod(dealt_before, len(self.fitting[self.directions[domain]]))
        return int(self._order(domain, epoch)[place])

    def _shuffled(self, domain: int, epoch: int) -> np.ndarray:
        return self._generator(3, domain, epoch).permutation(self.fitting[self.directions[domain]])

    def _generator(self, *what: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, *what))))

    def _weights(self, weights: Weights, epochs: Mapping[str, float] | None, num_batches: int | None) -> list[float]:
        if epochs is None:
            tokens = [int(self.pairs.lengths(d, numbers)[:, 1].sum()) for d, numbers in self.fitting.items()]
            return weights_of(self.names, tokens, weights)
        if num_batches is None or weights != "proportional":
            raise DataError("epochs say everything about the shares, given num_batches; leave out the weights")
        sizes = [len(numbers) for numbers in self.fitting.values()]
        return weights_of_epochs(self.names, sizes, epochs, num_batches * self.batch_size, 1, unit="pairs")


def held_out_pairs(
    pairs: Pairs, directions: Sequence[Direction], most_tokens: int, max_tokens: int | None, start_id: int
) -> dict[str, Iterator[SourcedBatch]]:
    """For each direction its held-out pairs, those of at most `most_tokens`, always the same ones in the same batches.

    With a maximum, pairs of about so many target tokens a direction are spread evenly over all of them; at least one.
    """
    fitting = pairs.fitting({direction: pairs.held_out[direction] for direction in directions}, most_tokens)
    batch_size = max(1, 4096 // most_tokens)

    def batches(domain: int, direction: Direction, numbers: np.ndarray) -> Iterator[SourcedBatch]:
        lengths = pairs.lengths(direction, numbers)
        wanted = len(numbers)
        if max_tokens is not None:
            wanted = min(wanted, max(1, round(wanted * max_tokens / lengths[:, 1].sum())))
        chosen = np.arange(wanted) * len(numbers) // wanted
        chosen = chosen[np.argsort(lengths[chosen].sum(axis=1), kind="stable")]
        for first in range(0, wanted, batch_size):
            numbers_B = numbers[chosen[first : first + batch_size]]
            yield _batch(pairs, directions, np.full(len(numbers_B), domain), numbers_B, start_id)

    return {
        direction.name: batches(domain, direction, fitting[direction])
        for domain, direction in enumerate(directions)
        if len(fitting[direction])
    }


def _batch(
    pairs: Pairs, directions: Sequence[Direction], domains_B: np.ndarray, numbers_B: np.ndarray, start_id: int
) -> SourcedBatch:
    examples = [
        pairs.example(directions[domain], number)
        for domain, number in zip(domains_B.tolist(), numbers_B.tolist(), strict=True)
    ]
    return collate(examples, domains_B, start_id=start_id, pad_id=pairs.eos_id)


def _tokenized(corpus: PairCorpus, tokenizer: Tokenizer, language: str) -> Texts:
    texts, dtype = [segment.texts.get(language, "") for segment in corpus.segments], ids_dtype(tokenizer)
    rows = [
        np.array(ids, dtype=dtype)
        for first in range(0, len(texts), _ENCODED_AT_ONCE)
        for ids in tokenizer.encode_batch(texts[first : first + _ENCODED_AT_ONCE])
    ]
    return Texts(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))


def _numbers(corpus: PairCorpus, direction: Direction, *, held_out: bool) -> np.ndarray:
    return np.array(
        [
            number
            for number, segment in enumerate(corpus.segments)
            if direction in segment.directions and corpus.is_held_out[number] == held_out
        ],
        dtype=np.int64,
    )


def _language_id(tokenizer: Tokenizer, language: str) -> int:
    found = tokenizer.language_id(language)
    if found is None:
        raise DataError(
            f"the tokenizer has no special token for the language {language!r}, neither {language_token(language)} nor "
            f"{language}; name the language as the tokenizer does, or leave the tokenizer out to have one trained"
        )
    return found
