"""T5's denoising: spans of a text are taken out of the source, and are what the target consists of. numpy only.

    text     the cat sat on the mat today
    source   the <extra_id_0> on the <extra_id_1> eos
    target   <extra_id_0> cat sat <extra_id_1> mat today eos

Source: Raffel et al. 2019, arXiv:1910.10683, section 3.1.4 (15 %, spans of 3), and Switch Transformer,
arXiv:2101.03961, section 2.1. As in T5's own code a text begins with what is kept and ends with what is taken out,
and spans lie anywhere between: every way to cut kept and taken tokens into that many pieces is equally likely.

B batch, S sequence (tokens of text in a window), M length of the sources.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moesaic.data.held_out import held_out_windows
from moesaic.data.loader import Batches
from moesaic.data.packed import Packed
from moesaic.data.sourced import Example, SourcedBatch, collate
from moesaic.errors import DataError

HELD_OUT_SEED = 0  # of held-out spans: runs of every seed are asked for the same ones


class SpanLengths(NamedTuple):
    """How a text of a given length is corrupted: tokens kept and taken, in how many spans each."""

    kept: int
    taken: int
    spans: int

    @property
    def source(self) -> int:
        """Tokens of the source: what is kept, a sentinel a span, eos."""
        return self.kept + self.spans + 1

    @property
    def target(self) -> int:
        """Tokens of the target: what is taken, a sentinel a span, eos."""
        return self.taken + self.spans + 1


@dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """How much is taken out of a text, and what stands for it. `sentinel_ids` in the order in which they are used.

    noise_density: the part of the tokens that is taken. mean_span_length: of one span, in tokens.
    """

    sentinel_ids: tuple[int, ...]
    eos_id: int
    noise_density: float = 0.15
    mean_span_length: float = 3.0

    def lengths(self, num_tokens: int) -> SpanLengths:
        """Of a text of `num_tokens`, 2 or more: at least one token is taken, and one is kept before each span."""
        taken = min(max(1, round(num_tokens * self.noise_density)), num_tokens - 1)
        spans = min(max(1, round(taken / self.mean_span_length)), taken, num_tokens - taken)
        return SpanLengths(num_tokens - taken, taken, spans)

    def corrupt(self, ids: np.ndarray, generator: np.random.Generator) -> Example:
        """Take spans out of a text of 2 tokens or more.

        Raises DataError when there are fewer sentinels than spans.
        """
        lengths = self.lengths(len(ids))
        self.require_sentinels(lengths.spans, len(ids))
        kept = _cut(lengths.kept, lengths.spans, generator)
        taken = _cut(lengths.taken, lengths.spans, generator)
        ends = np.cumsum(np.stack([kept, taken], axis=1).reshape(-1))  # of kept, taken, kept, taken, ...
        pieces = np.split(ids.astype(np.int64), ends[:-1])
        source, target = [], []
        for sentinel, kept_ids, taken_ids in zip(self.sentinel_ids, pieces[::2], pieces[1::2], strict=False):
            source += [kept_ids, [sentinel]]
            target += [[sentinel], taken_ids]
        return Example(np.concatenate([*source, [self.eos_id]]), np.concatenate([*target, [self.eos_id]]))

    def restore(self, source_ids: Sequence[int], target_ids: Sequence[int]) -> list[int]:
        """The text that a source and its target were made of: each sentinel replaced by what follows it in the target.

        Raises DataError when the two do not belong together.
        """
        spans, sentinels = self._spans(target_ids), set(self.sentinel_ids)
        if [token for token in source_ids if token in sentinels] != list(spans) or source_ids[-1] != self.eos_id:
            raise DataError("this source and this target have other sentinels; give a pair that was made together")
        pieces = (spans.get(token, [token]) for token in map(int, source_ids[:-1]))
        return [token for piece in pieces for token in piece]

    def require_sentinels(self, needed: int, num_tokens: int) -> None:
        """Raises DataError when there are fewer than `needed` sentinels, which is what `num_tokens` of text ask for."""
        if needed > len(self.sentinel_ids):
            raise DataError(
                f"span corruption of {num_tokens} tokens needs {needed} sentinels and the vocabulary has "
                f"{len(self.sentinel_ids)} (<extra_id_0>, <extra_id_1>, ...); pack the text with `moesaic pack "
                f"--sentinels {max(100, needed)}`, or give training the text itself"
            )

    def _spans(self, target_ids: Sequence[int]) -> dict[int, list[int]]:
        sentinels, spans, last = set(self.sentinel_ids), dict[int, list[int]](), None
        for token in map(int, target_ids[:-1]):
            if token in sentinels:
                last = token
                spans[last] = []
            elif last is None:
                raise DataError("this target does not begin with a sentinel; give one that was made by corrupt")
            else:
                spans[last].append(token)
        return spans


class SpanBatches:
    """The windows of `Batches`, corrupted: the same order, the same resuming by number, spans new in every batch."""

    def __init__(self, windows: Batches, corruption: SpanCorruption, start_id: int) -> None:
        self.windows, self.corruption, self.start_id = windows, corruption, start_id
        length = windows.sequence_length
        if length < 2:
            raise DataError(f"sequence_length={length}; span corruption needs 2 tokens or more")
        corruption.require_sentinels(corruption.lengths(length).spans, length)

    def batch(self, number: int) -> SourcedBatch:
        """The batch of this number, counted from 0."""
        plain = self.windows.batch(number)
        examples = [
            self.corruption.corrupt(ids, _generator(self.windows.seed, number, row))
            for row, ids in enumerate(plain.inputs_BS)
        ]
        return collate(examples, plain.domain_ids_B, start_id=self.start_id, pad_id=self.corruption.eos_id)


def held_out_spans(
    packed: Packed, corruption: SpanCorruption, sequence_length: int, max_tokens: int | None, start_id: int
) -> dict[str, Iterator[SourcedBatch]]:
    """For each domain its held-out windows, corrupted, always alike; at most `max_tokens` of text a domain."""
    batch_size = max(1, 4096 // sequence_length)
    windows = held_out_windows(packed, sequence_length, max_tokens, batch_size=batch_size)

    def corrupted(domain: int, name: str) -> Iterator[SourcedBatch]:
        for number, batch in enumerate(windows[name]):
            texts = [ids[mask] for ids, mask in zip(batch.inputs_BS, batch.mask_BS, strict=True)]
            examples = [
                corruption.corrupt(ids, _generator(HELD_OUT_SEED, number, row, domain + 1))
                for row, ids in enumerate(texts)
                if len(ids) > 1
            ]
            if examples:
                domains_B = np.full(len(examples), domain)
                yield collate(examples, domains_B, start_id=start_id, pad_id=corruption.eos_id)

    return {name: corrupted(domain, name) for domain, name in enumerate(windows)}


def _cut(num_tokens: int, num_pieces: int, generator: np.random.Generator) -> np.ndarray:
    """The lengths of `num_pieces` pieces, none of them empty; every way to cut is equally likely."""
    ends = 1 + np.sort(generator.permutation(num_tokens - 1)[: num_pieces - 1])
    return np.diff(ends, prepend=0, append=num_tokens)


def _generator(seed: int, number: int, row: int, held_out_domain: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, 2, number, row, held_out_domain))))
