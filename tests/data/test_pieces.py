import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from moesaic.data import pieces
from moesaic.data.pieces import Encoder, can_be_cut
from moesaic.data.tokenizer import SPLITTINGS, Tokenizer

ODD = " \t\n\r\f\v\x1c\x1f\x85\xa0\u1680\u2003\u2028\u3000ab'stréll09²½٣.,!_-<|>中文字\u0301\U0001f600"
TEXTS = st.text(
    st.one_of(st.sampled_from(ODD), st.sampled_from("  \n\nabc"), st.characters(codec="utf-8")), max_size=60
)
SAMPLE = ["It's the cat's 12 dogs' 3,456 café,\n\n    def f(x):\n\treturn  'll\u3000 中文字 ½ \x1c ! "] * 40


def trained(name: str) -> Tokenizer:
    tokenizer = Tokenizer.train(SAMPLE, 400)
    tokenizer.backend.pre_tokenizer = SPLITTINGS[name].pre_tokenizer
    return tokenizer


CUT = {name: trained(name) for name in ("gpt-2", "smollm")}


@settings(max_examples=300)
@given(name=st.sampled_from(list(CUT)), texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_pieces_have_the_ids_of_the_whole(name: str, texts: list[str]) -> None:
    """Against the library on whole texts, over every kind of white space and what clings to it."""
    assert can_be_cut(CUT[name])
    encoder = Encoder(CUT[name])
    for _ in range(2):  # the second time from memory
        ids, lengths = encoder.encode(texts)
        found = [piece.tolist() for piece in np.split(ids, np.cumsum(lengths)[:-1])]
        assert found == [[0, *whole] for whole in CUT[name].encode_batch(texts)]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "REMEMBERED", 50)
    encoder = Encoder(CUT["smollm"])
    for first in range(0, 500, 10):
        texts = [" ".join(map(str, range(first, first + 10)))]
        assert encoder.encode(texts).ids[1:].tolist() == CUT["smollm"].encode_batch(texts)[0]
        assert len(encoder._known) <= 60


def test_other_rules_are_left_to_the_library() -> None:
    def changed(change) -> Tokenizer:
        backend = tokenizers.Tokenizer.from_str(CUT["smollm"].backend.to_str())
        change(backend)
        return Tokenizer(backend, eos_token="<|endoftext|>")

    for change in (
        lambda backend: setattr(backend, "normalizer", normalizers.NFC()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: setattr(backend, "pre_tokenizer", SPLITTINGS["qwen2"].pre_tokenizer),
        lambda backend: setattr(backend.model, "dropout", 0.1),
        lambda backend: backend.add_tokens([AddedToken("cat dog", special=False)]),
        lambda backend: backend.enable_truncation(5),
    ):
        assert not can_be_cut(changed(change))
    tokenizer = changed(lambda backend: backend.add_tokens([AddedToken("cat dog", special=False)]))
    ids, lengths = Encoder(tokenizer).encode(["a cat dog", "b"])
    assert [piece.tolist()[1:] for piece in np.split(ids, np.cumsum(lengths)[:-1])] == tokenizer.encode_batch(
        ["a cat dog", "b"]
    )
