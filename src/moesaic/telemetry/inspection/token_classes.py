"""What kind of thing a token is, judged in its place: punctuation, digits, case, affixes. No torch here.

N tokens.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

CLASSES = (
    "lower-case word",
    "Capitalised word",
    "UPPER-CASE word",
    "beginning of a word",
    "middle of a word",
    "end of a word",
    "letters without case",
    "digits",
    "punctuation",
    "symbols",
    "spaces and line ends",
    "part of a character",
    "special token",
)
(LOWER, CAPITAL, UPPER, PREFIX, INFIX, SUFFIX, CASELESS, DIGITS, PUNCTUATION, SYMBOLS, SPACE, BYTES, SPECIAL) = range(
    len(CLASSES)
)
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def classes_of(texts: Sequence[str], token_ids_N: np.ndarray, text_starts_N: np.ndarray) -> np.ndarray:
    """The class of each token, an index into CLASSES, int64 [N].

    texts: of every token id, its leading space included; a special token's is empty. text_starts_N: whether a new text
    begins, where nothing before belongs to the same word.

    A word that is cut into several tokens has a beginning, middles and an end (prefix, infixes, suffix), whatever their
    case; a word in one token is told by its case. A token of several kinds is what most of its characters are.
    """
    kinds_V = np.array([_kind(text) for text in texts], dtype=np.int64)
    ends_V = np.array([text[-1:].isalpha() for text in texts])
    begins_V = np.array([text[:1].isalpha() for text in texts])
    kinds_N = kinds_V[token_ids_N]
    follows_N = np.zeros(len(token_ids_N), dtype=bool)  # whether a token goes on with the word of the one before
    follows_N[1:] = begins_V[token_ids_N[1:]] & ends_V[token_ids_N[:-1]] & ~text_starts_N[1:].astype(bool)
    goes_on_N = np.append(follows_N[1:], False)
    has_case_N = np.isin(kinds_N, (LOWER, CAPITAL, UPPER))
    # Scripts without case do not put spaces between words, so nothing tells where one of theirs ends.
    place_N = np.where(follows_N, np.where(goes_on_N, INFIX, SUFFIX), np.where(goes_on_N, PREFIX, kinds_N))
    return np.where(has_case_N, place_N, kinds_N)


def _kind(text: str) -> int:
    """What a token is by itself."""
    if not text:
        return SPECIAL
    if text.isspace():
        return SPACE
    if _UNKNOWN in text:
        return BYTES
    characters = [_kind_of_character(character) for character in text if not character.isspace()]
    kind = max(set(characters), key=lambda each: (characters.count(each), -each))
    return _case(text) if kind == LOWER else kind


def _kind_of_character(character: str) -> int:
    category = unicodedata.category(character)
    if category[0] in "LM":
        return LOWER if character.lower() != character.upper() else CASELESS
    if category[0] == "N":
        return DIGITS
    return PUNCTUATION if category[0] == "P" else SYMBOLS


def _case(text: str) -> int:
    letters = [character for character in text if character.isalpha()]
    if len(letters) > 1 and all(character.isupper() for character in letters):
        return UPPER
    return CAPITAL if letters[0].isupper() else LOWER
