"""Tokenizing by pieces: words come again and again, so each is tokenized once and its ids are remembered."""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moesaic.data.tokenizer import SPLITTINGS, Tokenizer

REMEMBERED = 400_000  # pieces; about 60 MB

# Cut where a space, tab or line end follows what is no white space. No token of the splittings below lies across such a
# place, and none of their patterns looks from one side of it to the other. Other white space is left within a piece.
_PIECES = re.compile(r"\s*+(?:\S++(?:[^\S \t\n\r]\s*+)?+)++|\s++")
_CUTTABLE = ("gpt-2", "smollm")


class Encoded(NamedTuple):
    """Documents as ids, each with the eos before it; `lengths` count the ids of each, its eos included."""

    ids: np.ndarray
    lengths: np.ndarray


class Encoder:
    """Documents to ids, exactly those of the tokenizer, and several times sooner where its rules allow pieces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._dtype = tokenizer, ids_dtype(tokenizer)
        self._eos = np.array([tokenizer.eos_id], dtype=self._dtype).tobytes()
        self._known: dict[str, bytes] = {}
        self._by_pieces = can_be_cut(tokenizer)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """The ids of each document, an eos before it, all in one array."""
        documents = self._join(texts) if self._by_pieces else self._ids(texts)
        ids = np.frombuffer(b"".join(self._eos + document for document in documents), dtype=self._dtype)
        lengths = [len(document) // self._dtype.itemsize + 1 for document in documents]
        return Encoded(ids, np.array(lengths, dtype=np.int64))

    def _join(self, texts: Sequence[str]) -> list[bytes]:
        if len(self._known) > REMEMBERED:
            self._known.clear()
        cut = [_PIECES.findall(text) for text in texts]
        new = list({piece for pieces in cut for piece in pieces if piece not in self._known})
        self._known.update(zip(new, self._ids(new), strict=True))
        return [b"".join(map(self._known.__getitem__, pieces)) for pieces in cut]

    def _ids(self, texts: Sequence[str]) -> list[bytes]:
        return [np.array(ids, dtype=self._dtype).tobytes() for ids in self._tokenizer.encode_batch(texts)]


def ids_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type that holds every id, little-endian."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def can_be_cut(tokenizer: Tokenizer) -> bool:
    """Whether the ids of a text are those of its pieces: known splitting, no normalisation, nothing random or added."""
    rules = json.loads(tokenizer.backend.to_str())
    splittings = [json.loads(SPLITTINGS[name].pre_tokenizer.__getstate__()) for name in _CUTTABLE]
    return (
        _without_offsets(rules["pre_tokenizer"]) in map(_without_offsets, splittings)
        and rules["model"]["type"] == "BPE"
        and not rules["model"].get("dropout")
        and not rules["normalizer"]
        and not rules["truncation"]
        and not rules["padding"]
        and all(token["special"] for token in rules["added_tokens"])
    )


def _without_offsets(rules: object) -> object:
    """`trim_offsets` says where a token is said to lie, not what it is."""
    if isinstance(rules, dict):
        return {key: _without_offsets(value) for key, value in rules.items() if key != "trim_offsets"}
    return [_without_offsets(value) for value in rules] if isinstance(rules, list) else rules
