"""/v1/completions, asked by the official client; transformers' model of the same folder is the oracle."""

import openai
import pytest

from tests.serve import tiny
from tests.serve.http.conftest import MODEL

PROMPT = "the quick brown fox"


def expected(prompt: str, count: int) -> str:
    ids = tiny.tokenizer().encode(prompt)
    return tiny.tokenizer().decode(tiny.engine().generate(ids, count))


def test_text_and_usage(client: openai.OpenAI) -> None:
    found = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0)
    assert found.choices[0].text == expected(PROMPT, 8)
    assert found.choices[0].finish_reason == "length"
    assert found.usage and found.usage.completion_tokens == 8
    assert found.usage.prompt_tokens == len(tiny.tokenizer().encode(PROMPT))


def test_streamed_text_is_the_same(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected(PROMPT, 20)
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 20


def test_prompts_in_every_form(client: openai.OpenAI) -> None:
    texts = [PROMPT, "lazy dog"]
    ids = [tiny.tokenizer().encode(text) for text in texts]
    wanted = [expected(text, 5) for text in texts]
    for prompt in (texts, ids):
        found = client.completions.create(model=MODEL, prompt=prompt, max_tokens=5, temperature=0)
        assert [choice.text for choice in found.choices] == wanted
        assert [choice.index for choice in found.choices] == [0, 1]
    alone = client.completions.create(model=MODEL, prompt=ids[0], max_tokens=5, temperature=0)
    assert alone.choices[0].text == wanted[0]


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt=PROMPT)
    assert caught.value.code == "model_not_found"
