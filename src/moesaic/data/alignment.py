"""Aligning a text with its translations: by numbered headings, then paragraph by paragraph, then by sentences.

The first language is the one that the others are compared with. A group is a piece of text in several languages.
"""

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from moesaic.data.gale_church import Bead, align_lengths, deviation
from moesaic.errors import DataError

Group = dict[str, str]
"""Language -> text."""

Unit = Literal["paragraph", "sentence"]

MOST_DEVIATION = 4.0  # standard deviations of length from which two texts are no translations of each other
MOST_SHARED_WORDS = 0.5  # of a text's words that stand in the first language's: above it was left untranslated

_HEADING = re.compile(r"\s*(\d+(?:\.\d+)+)\.?\s")
_SENTENCE_END = re.compile(
    r"(?<=[^\W\d_][.!?…])(?:\s?[\"”»’)\]])*\s+(?=[\"“«‘(¿¡]*[^\W\d_a-z])"  # then a capital letter
    r"|(?<=[。！？])(?![”’』」）)])|(?<=[。！？][”’』」）)])"
)
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\d_]+")


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """What came of an alignment: the groups, and why how many texts were left out of them.

    sections: between matching headings, and how many of them have as many paragraphs in every language.
    """

    groups: tuple[Group, ...]
    sections: int
    even_sections: int
    left_out: Counter[str] = field(default_factory=Counter)


def align(texts: Mapping[str, str], unit: Unit = "paragraph") -> Aligned:
    """Align translations of one text, the first language's with each of the others.

    Paragraphs end at blank lines. Between headings with equal section numbers, as many paragraphs as in the first
    language are taken to be the same ones; other numbers are aligned by length. Left out are texts that are not
    translated, have no letters, or are too long or short for what they would translate.
    Raises DataError for fewer than two languages, and for a text without paragraphs.
    """
    if len(texts) < 2:
        raise DataError(f"{len(texts)} languages to align; give two or more")
    paragraphs = {language: _paragraphs(text) for language, text in texts.items()}
    for language, found in paragraphs.items():
        if not found:
            raise DataError(f"the text of {language!r} has no paragraphs; give one that has")
    first, *others = paragraphs
    beads, even, left_out = {}, Counter[bool](), Counter[str]()
    for language in others:
        beads[language], sections = _align_paragraphs(paragraphs[first], paragraphs[language])
        even.update(sections)
    groups = _translated(_groups(paragraphs, beads), left_out)
    ratios = _ratios(groups)
    if unit == "sentence":
        pieces = (piece for group in _plausible(groups, ratios, Counter()) for piece in _sentence_groups(group, ratios))
        groups = _translated(pieces, left_out)
    groups = _plausible(groups, ratios, left_out)
    return Aligned(groups=_distinct(groups), sections=even.total(), even_sections=even[True], left_out=left_out)


def sentences(text: str) -> list[str]:
    """A paragraph cut after full stops, question and exclamation marks that end a sentence as far as one can see."""
    cut, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        cut.append(text[start : end.end()].strip())
        start = end.end()
    return [piece for piece in (*cut, text[start:].strip()) if piece]


class _Section(NamedTuple):
    """Paragraphs from `first` to before `end`, and so in the other text."""

    first: int
    end: int
    other_first: int
    other_end: int


def _paragraphs(text: str) -> list[str]:
    return [" ".join(block.split()) for block in re.split(r"\n[^\S\n]*\n", text) if block.strip()]


def _align_paragraphs(first: Sequence[str], other: Sequence[str]) -> tuple[list[Bead], list[bool]]:
    """The beads, and of each section whether it has as many paragraphs in both."""
    beads, even = [], []
    ratio = sum(map(len, other)) / sum(map(len, first))
    for section in _sections(first, other):
        size, other_size = section.end - section.first, section.other_end - section.other_first
        even.append(size == other_size)
        if even[-1]:
            found = [Bead(i, i + 1, i, i + 1) for i in range(size)]
        else:
            lengths = [len(text) for text in first[section.first : section.end]]
            other_lengths = [len(text) for text in other[section.other_first : section.other_end]]
            found = align_lengths(lengths, other_lengths, ratio)
        shift = (section.first, section.first, section.other_first, section.other_first)
        beads += [Bead(*map(sum, zip(bead, shift, strict=True))) for bead in found]
    return beads, even


def _sections(first: Sequence[str], other: Sequence[str]) -> Iterator[_Section]:
    """What lies between headings whose numbers match, in order; a section begins with its heading."""
    places, other_places = _headings(first), _headings(other)
    matcher = difflib.SequenceMatcher(None, list(places.values()), list(other_places.values()), autojunk=False)
    starts, other_starts = list(places), list(other_places)
    matches = [
        (starts[block.a + i], other_starts[block.b + i])
        for block in matcher.get_matching_blocks()
        for i in range(block.size)
    ]
    ends = [(0, 0), *matches, (len(first), len(other))]
    for (begin, other_begin), (end, other_end) in itertools.pairwise(ends):
        if end > begin or other_end > other_begin:
            yield _Section(begin, end, other_begin, other_end)


def _headings(paragraphs: Sequence[str]) -> dict[int, str]:
    """Place -> section number."""
    found = ((place, _HEADING.match(text)) for place, text in enumerate(paragraphs))
    return {place: match[1] for place, match in found if match}


def _groups(parts: Mapping[str, Sequence[str]], beads: Mapping[str, Sequence[Bead]]) -> Iterator[Group]:
    """The smallest pieces that every language agrees on; what only another language has is in none of them."""
    first = next(iter(parts))
    borders = {language: _borders(found) for language, found in beads.items()}
    common = sorted(set.intersection(*(set(of_language) for of_language in borders.values())))
    for begin, end in itertools.pairwise(common):
        group = {first: " ".join(parts[first][begin:end])}
        for language, of_language in borders.items():
            group[language] = " ".join(parts[language][of_language[begin][1] : of_language[end][0]])
        yield group


def _borders(beads: Sequence[Bead]) -> dict[int, tuple[int, int]]:
    """Place in the first text where a bead begins or ends -> the first and the last such place in the other."""
    found: dict[int, tuple[int, int]] = {}
    for place, other in [(0, 0), *((bead.end, bead.other_end) for bead in beads)]:
        low, _ = found.get(place, (other, other))
        found[place] = (low, other)
    return found


def _sentence_groups(group: Group, ratios: Mapping[str, float]) -> Iterator[Group]:
    parts = {language: sentences(text) for language, text in group.items()}
    lengths = {language: [len(sentence) for sentence in found] for language, found in parts.items()}
    first, *others = parts
    beads = {language: align_lengths(lengths[first], lengths[language], ratios[language]) for language in others}
    yield from _groups(parts, beads)


def _ratios(groups: Sequence[Group]) -> dict[str, float]:
    """How much longer translations into each language are: the median over the characters of what they translate."""
    lengths: dict[str, list[tuple[float, int]]] = {}
    for group in groups:
        first, *others = group
        for language in others:
            size = len(group[first])
            lengths.setdefault(language, []).append((len(group[language]) / size, size))
    return {language: _weighted_median(found) for language, found in lengths.items()}


def _weighted_median(values: list[tuple[float, int]]) -> float:
    values.sort()
    total = sum(weight for _, weight in values)
    below = itertools.accumulate(weight for _, weight in values)
    return next(value for (value, _), so_far in zip(values, below, strict=True) if 2 * so_far >= total)


def _translated(groups: Iterable[Group], left_out: Counter[str]) -> list[Group]:
    """The groups without the texts that translate nothing."""
    return _filtered(groups, _not_translated, left_out)


def _plausible(groups: Iterable[Group], ratios: Mapping[str, float], left_out: Counter[str]) -> list[Group]:
    """The groups without the texts that are too short or too long for what they translate."""

    def fault(language: str, first: str, other: str) -> str | None:
        return "length" if deviation(len(first), len(other) / ratios[language]) > MOST_DEVIATION else None

    return _filtered(groups, fault, left_out)


def _not_translated(language: str, first: str, other: str) -> str | None:
    words, first_words = _WORD.findall(other.lower()), set(_WORD.findall(first.lower()))
    if not words or not first_words:
        return "no letters"
    shared = sum(word in first_words for word in words)
    return "not translated" if shared > MOST_SHARED_WORDS * len(words) else None


def _filtered(
    groups: Iterable[Group], fault: Callable[[str, str, str], str | None], left_out: Counter[str]
) -> list[Group]:
    """The texts in which `fault(language, first text, text)` finds none, with the first one where any is left."""
    kept = []
    for group in groups:
        first, *others = group
        faults = {language: fault(language, group[first], group[language]) for language in others}
        left_out.update(f"{language}: {why}" for language, why in faults.items() if why)
        if not all(faults.values()):
            kept.append({language: group[language] for language in group if not faults.get(language)})
    return kept


def _distinct(groups: Sequence[Group]) -> tuple[Group, ...]:
    return tuple(dict(texts) for texts in dict.fromkeys(tuple(group.items()) for group in groups))
