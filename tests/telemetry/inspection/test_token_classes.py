import numpy as np
import pytest

from moesaic.telemetry.inspection.token_classes import CLASSES, classes_of

# Tokens of one text and what each is there.
TEXT = [
    ("The", "Capitalised word"),
    (" quick", "lower-case word"),
    (" jump", "beginning of a word"),
    ("ed", "end of a word"),
    (" NASA", "UPPER-CASE word"),
    (" un", "beginning of a word"),
    ("believ", "middle of a word"),
    ("able", "end of a word"),
    (" I", "Capitalised word"),
    (" 12", "digits"),
    ("th", "lower-case word"),
    (",", "punctuation"),
    (" (", "punctuation"),
    (" +", "symbols"),
    ("€", "symbols"),
    ("\n\t", "spaces and line ends"),
    ("城", "letters without case"),
    ("东", "letters without case"),
    ("�", "part of a character"),
    ("", "special token"),
    ("été", "lower-case word"),
    (" --x", "punctuation"),
]


def test_tokens_are_told_by_their_kind_and_their_place():
    texts = [text for text, _ in TEXT]
    starts = np.zeros(len(TEXT), bool)
    found = classes_of(texts, np.arange(len(TEXT)), starts)
    assert [CLASSES[each] for each in found] == [kind for _, kind in TEXT]


@pytest.mark.parametrize(("starts_anew", "kinds"), [(False, (3, 5)), (True, (0, 0))])
def test_a_new_text_does_not_go_on_with_a_word(starts_anew, kinds):
    found = classes_of(["jump", "ed"], np.array([0, 1]), np.array([True, starts_anew]))
    assert tuple(found) == kinds
