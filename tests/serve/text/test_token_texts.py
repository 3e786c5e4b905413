"""Single tokens as bytes and text."""

from moesaic.data.tokenizer import Tokenizer
from moesaic.serve.text.kept_text import KeptText
from moesaic.serve.text.token_texts import TokenTexts
from tests.serve import tiny


def test_bytes_of_tokens_are_those_of_the_text() -> None:
    texts, text = TokenTexts(tiny.tokenizer()), "naïve café — 東京 \n\t🙂"
    ids = tiny.tokenizer().encode(text)
    assert b"".join(texts.bytes_of(token_id) for token_id in ids) == text.encode()


def test_parts_of_characters_are_spelled_as_bytes() -> None:
    texts = TokenTexts(tiny.tokenizer())
    ids = tiny.tokenizer().encode("東")
    assert len(ids) > 1
    assert [texts.text_of(token_id) for token_id in ids] == [f"bytes:\\x{byte:02x}" for byte in "東".encode()]


def test_special_tokens_are_their_names_and_unknown_ids_nothing() -> None:
    texts = TokenTexts(tiny.tokenizer())
    assert texts.text_of(tiny.tokenizer().encode("<|im_end|>")[0]) == "<|im_end|>"
    assert texts.text_of(10**6) == ""


def test_marks_of_calls_are_kept_and_other_special_tokens_are_not() -> None:
    tokenizer = Tokenizer.train([tiny.TEXT], 300, extra_tokens=["[TOOL_CALLS]", "<|channel|>"])
    ids = tokenizer.encode("[TOOL_CALLS]the<|im_end|> fox<|channel|>")
    assert KeptText(tokenizer)(ids) == "[TOOL_CALLS]the fox<|channel|>"
