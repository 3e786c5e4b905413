"""Texts with their translations: read from JSON lines, and split into those to train on and those held out.

A line is {"en": "...", "fr": "...", ...}, one text in two or more languages, to be translated from each to each; or
{"source": "...", "target": "...", "source_language": "en", "target_language": "fr"}, to be translated this way only.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moesaic.data.corpus import HELD_OUT_SHARE, MAX_HELD_OUT_BYTES, MAX_HELD_OUT_SHARE, MIN_HELD_OUT_BYTES
from moesaic.data.sources import check_characters, is_rows_file, read_rows
from moesaic.errors import DataError

EXAMPLE = (
    'each line must be like {"en": "...", "fr": "..."} or {"source": "...", "target": "...", "source_language": "en", '
    '"target_language": "fr"}'
)

_DIRECTED = {"source", "target", "source_language", "target_language"}


class Direction(NamedTuple):
    """From which language into which."""

    source: str
    target: str

    @property
    def name(self) -> str:
        """As settings and reports have it: en-fr."""
        return f"{self.source}-{self.target}"


class Segment(NamedTuple):
    """One line: a text in several languages, and the ways in which it is translated."""

    texts: dict[str, str]
    directions: tuple[Direction, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class PairCorpus:
    """Segments, and which of them are held out. `source` says in words where they are from.

    No text of a held-out segment, in whatever language, is a text of another one; blanks and case do not tell texts
    apart here. digest: equal digests mean equal segments, order and split.
    """

    source: str
    segments: tuple[Segment, ...]
    is_held_out: np.ndarray
    digest: str

    @cached_property
    def languages(self) -> tuple[str, ...]:
        """Sorted."""
        return tuple(sorted({language for segment in self.segments for language in segment.texts}))

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(map(_num_bytes, self.segments))

    def train_texts(self) -> dict[str, list[str]]:
        """The texts to train on, by language."""
        kept = [self.segments[number].texts for number in np.flatnonzero(~self.is_held_out)]
        return {language: [texts[language] for texts in kept if language in texts] for language in self.languages}


def read_pairs(path: str | Path) -> PairCorpus:
    """Read a .jsonl file (also .gz, .zst), or all of them in a folder, and hold a part out.

    The part is as large as `corpus` makes that of plain text, and depends on the texts alone. A line that occurred
    before is dropped. Raises DataError with file and line for what is no pair, and when none can be held out.
    """
    found: dict[Any, Segment] = {}
    for file in _files(Path(path)):
        for segment in _segments(file):
            found.setdefault((tuple(segment.texts.items()), segment.directions), segment)
    segments = tuple(found.values())
    is_held_out = _held_out(segments)
    if is_held_out.all() or not is_held_out.any():
        raise DataError(
            f"{path} has {len(segments)} different lines and none of them can be held out, for all are too long or "
            "share a text; give more"
        )
    return PairCorpus(
        source=str(path), segments=segments, is_held_out=is_held_out, digest=_digest(segments, is_held_out)
    )


def _files(path: Path) -> list[Path]:
    if is_rows_file(path):
        return [path]
    files = sorted(file for file in path.rglob("*") if is_rows_file(file)) if path.is_dir() else []
    if not files:
        raise DataError(
            f"no .jsonl file (also .gz or .zst) of translations at {path}; `moesaic align` makes one of parallel texts"
        )
    return files


def _segments(path: Path) -> Iterator[Segment]:
    for number, row in read_rows(path, EXAMPLE):
        texts = {name: text for name, text in row.items() if isinstance(text, str) and text and not text.isspace()}
        if len(texts) < max(2, len(row)):
            seen = ", ".join(name for name in row if name not in texts) or "fewer than two fields"
            raise DataError(f"{path} line {number} has no text in {seen}; {EXAMPLE}")
        for name, text in texts.items():
            check_characters(path, number, name, text)
        yield _segment(path, number, texts)


def _segment(path: Path, number: int, texts: dict[str, str]) -> Segment:
    if not _DIRECTED & texts.keys():
        return Segment(texts, tuple(itertools.starmap(Direction, itertools.permutations(sorted(texts), 2))))
    if texts.keys() != _DIRECTED or texts["source_language"] == texts["target_language"]:
        raise DataError(f"{path} line {number} has fields {', '.join(texts)}, or one language twice; {EXAMPLE}")
    direction = Direction(texts["source_language"], texts["target_language"])
    return Segment({direction.source: texts["source"], direction.target: texts["target"]}, (direction,))


def _held_out(segments: Sequence[Segment]) -> np.ndarray:
    """Whole families of segments that share texts, in the order of their hashes, up to the bytes that are wanted."""
    families = _families(segments)
    sizes = {family: sum(_num_bytes(segments[number]) for number in family) for family in families}
    total = sum(sizes.values())
    wanted = max(MIN_HELD_OUT_BYTES, min(MAX_HELD_OUT_BYTES, round(total * HELD_OUT_SHARE)))
    wanted = min(wanted, round(total * MAX_HELD_OUT_SHARE))
    is_held_out, held = np.zeros(len(segments), dtype=bool), 0
    for family in sorted(families, key=lambda family: min(_hash(segments[number]) for number in family)):
        if held + sizes[family] <= wanted * 1.25:
            is_held_out[list(family)] = True
            held += sizes[family]
        if held >= wanted:
            break
    return is_held_out


def _families(segments: Sequence[Segment]) -> list[tuple[int, ...]]:
    """The numbers of segments that share a text with one another, directly or by way of others."""
    parents = list(range(len(segments)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    first_with: dict[str, int] = {}
    for number, segment in enumerate(segments):
        for text in segment.texts.values():
            other = first_with.setdefault(" ".join(text.casefold().split()), number)
            parents[root(number)] = root(other)
    families: dict[int, list[int]] = {}
    for number in range(len(segments)):
        families.setdefault(root(number), []).append(number)
    return [tuple(family) for family in families.values()]


def _num_bytes(segment: Segment) -> int:
    return sum(len(text.encode()) for text in segment.texts.values())


def _hash(segment: Segment) -> bytes:
    parts = (part for item in sorted(segment.texts.items()) for part in item)
    return hashlib.sha256("\0".join((*parts, *(direction.name for direction in segment.directions))).encode()).digest()


def _digest(segments: Sequence[Segment], is_held_out: np.ndarray) -> str:
    return hashlib.sha256(b"".join(map(_hash, segments)) + is_held_out.tobytes()).hexdigest()
