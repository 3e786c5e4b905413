"""Which experts made each token of a streamed answer: what the engine says when it is asked again."""

import re

import pytest

from moesaic.engine.cache import Text
from moesaic.engine.engine import Piece
from tests.serve import tiny
from tests.serve.http.conftest import MODEL


def streamed(client, kind: str, **options):
    if kind == "chat":
        messages = [{"role": "user", "content": "the quick"}]
        return client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, max_tokens=9, temperature=0, **options
        )
    return client.completions.create(
        model=MODEL, prompt="the quick", stream=True, max_tokens=9, temperature=0, **options
    )


def letters(text: str) -> str:
    """Without special tokens, and without characters that tokens may share: only the tokens' texts show those cut."""
    return re.sub(r"<\|\w+\|>", "", text).encode("ascii", "ignore").decode()


def told(chunks) -> tuple[list[str], dict[str, list[list[int]]], str]:
    tokens, experts, text = [], {}, ""
    for chunk in chunks:
        choice = chunk.choices[0]
        text += (choice.delta.content or "") if hasattr(choice, "delta") else choice.text
        extra = getattr(choice, "moesaic", None)
        if extra:
            tokens += extra["tokens"]
            for layer, rows in extra["experts"].items():
                experts.setdefault(layer, []).extend(rows)
    return tokens, experts, text


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_each_token_has_its_experts(client, kind) -> None:
    tokens, experts, text = told(streamed(client, kind, extra_body={"experts": True}))
    assert len(tokens) == 9 and experts.keys() == {"0", "1"}
    assert all(len(rows) == 9 and all(len(set(row)) == 2 for row in rows) for rows in experts.values())
    assert letters("".join(tokens)) == letters(text)


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_who_does_not_ask_is_told_nothing(client, kind) -> None:
    assert told(streamed(client, kind))[:2] == ([], {})


def test_the_experts_are_those_of_the_engine(client) -> None:
    """A token is made by the step that runs the one before it."""
    prompt = tiny.tokenizer().encode("the quick brown fox")
    options = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "stream": True, "temperature": 0}
    tokens, experts, _ = told(client.completions.create(**options, extra_body={"experts": True}))
    assert len(tokens) == 6
    engine, text, ids = tiny.engine(), Text(), [*prompt]
    for place in range(6):
        logits_NV = engine.step([Piece(text, ids[text.length :])])
        for layer, routed in engine.routed().items():
            assert experts[str(layer)][place] == routed.expert_ids_TM[-1].tolist()
        ids.append(int(logits_NV[0].argmax()))
