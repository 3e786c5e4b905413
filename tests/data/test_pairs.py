"""Translations from JSON lines: what a line may be, and a split that shares no text."""

import gzip
import json

import numpy as np
import pytest

from moesaic.data.pairs import Direction, read_pairs
from moesaic.errors import DataError


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sentences(count: int, languages=("en", "fr")) -> list[dict[str, str]]:
    return [{language: f"Sentence {i} in {language} with words." for language in languages} for i in range(count)]


def test_each_to_each_or_one_way(tmp_path):
    one_way = {"source": "Hallo Welt", "target": "hello world", "source_language": "de", "target_language": "en"}
    corpus = read_pairs(write(tmp_path / "pairs.jsonl", [*sentences(20, ("en", "fr", "de")), one_way]))
    assert corpus.languages == ("de", "en", "fr")
    assert len(corpus.segments[0].directions) == 6
    assert corpus.segments[-1].directions == (Direction("de", "en"),)
    assert corpus.segments[-1].texts == {"de": "Hallo Welt", "en": "hello world"}


def test_no_text_is_on_both_sides_of_the_split(tmp_path):
    generator = np.random.default_rng(0)
    rows = [
        {
            "en": f"Text number {generator.integers(500)}",
            "fr": f"Texte numéro {generator.integers(500)}",
            "zh": f"第 {i} 句",
        }
        for i in range(150)
    ]
    rows[3]["zh"], rows[77]["fr"] = "SHARED  text", "shared text"
    corpus = read_pairs(write(tmp_path / "pairs.jsonl", rows))
    texts: tuple[set[str], set[str]] = set(), set()
    for segment, is_held_out in zip(corpus.segments, corpus.is_held_out, strict=True):
        texts[int(is_held_out)].update(" ".join(text.casefold().split()) for text in segment.texts.values())
    assert texts[True] and texts[False] and not texts[True] & texts[False]
    assert 0.02 < corpus.is_held_out.mean() < 0.4
    assert sum(map(len, corpus.train_texts().values())) == 3 * (~corpus.is_held_out).sum()


def test_the_split_depends_on_the_texts_alone(tmp_path):
    rows = sentences(60)
    first = read_pairs(write(tmp_path / "a.jsonl", rows))
    second = read_pairs(write(tmp_path / "b.jsonl", rows[::-1]))
    assert np.array_equal(first.is_held_out, second.is_held_out[::-1])
    assert first.digest != second.digest  # the order is another
    assert first.digest == read_pairs(tmp_path / "a.jsonl").digest


def test_a_folder_of_files_and_repeated_lines(tmp_path):
    write(tmp_path / "a.jsonl", sentences(30))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in sentences(40)))
    assert len(read_pairs(tmp_path).segments) == 40


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is a list"),
        ('{"en": "a"}', "line 2 has no text in fewer than two fields"),
        ('{"en": "a", "fr": " "}', "line 2 has no text in fr"),
        ('{"en": "a", "fr": 3}', "line 2 has no text in fr"),
        ('{"en": "a", "source": "b"}', "line 2 has fields en, source"),
        ('{"source": "a", "target": "b", "source_language": "en", "target_language": "en"}', "one language twice"),
        ('{"en": "a", "fr": "\\ud800"}', "half a character"),
    ],
)
def test_lines_that_are_no_pairs(tmp_path, line, words):
    place = tmp_path / "pairs.jsonl"
    place.write_text('{"en": "a", "fr": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match=words):
        read_pairs(place)


def test_too_little_and_nothing(tmp_path):
    with pytest.raises(DataError, match=r"no \.jsonl file.*moesaic align"):
        read_pairs(tmp_path)
    with pytest.raises(DataError, match="none of them can be held out"):
        read_pairs(write(tmp_path / "pairs.jsonl", [{"en": "same", "fr": str(i)} for i in range(5)]))
