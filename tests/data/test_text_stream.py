"""TextStream against decoding everything at once."""

from hypothesis import given
from hypothesis import strategies as st

from moesaic.data.text_stream import TextStream


def decode_bytes(token_ids: list[int]) -> str:
    """A byte a token: the hardest vocabulary to stream."""
    return bytes(token_ids).decode("utf-8", "replace")


def decode_words(token_ids: list[int]) -> str:
    """Words that carry their leading space, which is lost at the start of a text (SentencePiece)."""
    return "".join(f" w{token}" for token in token_ids)[1:]


def stream(decode, prompt_ids, token_ids) -> tuple[list[str], str]:
    pieces: list[str] = []
    text = TextStream(decode, pieces.append, prompt_ids)
    for token_id in token_ids:
        text.add(token_id)
    return pieces, text.close()


@given(st.text(max_size=300), st.text(max_size=20))
def test_whole_characters_that_add_up(text, prompt):
    pieces, whole = stream(decode_bytes, list(prompt.encode()), list(text.encode()))
    assert "".join(pieces) == whole == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.binary(max_size=300))
def test_bytes_that_are_no_text(data):
    pieces, whole = stream(decode_bytes, [], list(data))
    assert "".join(pieces) == whole == decode_bytes(list(data))


def test_each_character_comes_when_it_is_whole():
    pieces, _ = stream(decode_bytes, [], list("aé€😀".encode()))
    assert pieces == ["a", "é", "€", "😀"]


def test_leading_space_after_a_prompt_survives():
    pieces, whole = stream(decode_words, [1, 2], range(3, 200))
    assert whole == "".join(f" w{token}" for token in range(3, 200))
    assert len(pieces) == 197


def test_cost_of_a_token_is_bounded():
    lengths: list[int] = []

    def decode(token_ids: list[int]) -> str:
        lengths.append(len(token_ids))
        return decode_bytes(token_ids)

    stream(decode, [65] * 1000, [66] * 1000)
    assert max(lengths) < 100
