"""/v1/completions, asked by the official client; transformers' model of the same folder is the oracle."""

from collections.abc import Callable, Sequence
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

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


@pytest.fixture(scope="module")
def oracle() -> Callable[[Sequence[int]], torch.Tensor]:
    """Log probabilities [N - 1, V] of what follows each of N token ids, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(tiny.folder(), dtype=torch.float32)

    @torch.inference_mode()
    def logprobs(token_ids: Sequence[int]) -> torch.Tensor:
        return torch.log_softmax(model(torch.tensor([list(token_ids)])).logits[0, :-1].float(), -1)

    return logprobs


def test_prompts_are_scored_as_transformers_scores_them(
    client: openai.OpenAI, oracle: Callable[[Sequence[int]], torch.Tensor]
) -> None:
    """As lm-eval asks: token ids, echo, one more token."""
    prompts = [tiny.tokenizer().encode(text) for text in (PROMPT, "naïve café 12345. the dog")]
    found = client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    for prompt, choice in zip(prompts, found.choices, strict=True):
        logprobs = choice.logprobs
        assert logprobs and logprobs.token_logprobs and logprobs.top_logprobs and logprobs.tokens
        assert len(logprobs.token_logprobs) == len(prompt) + 1
        expected_NV = oracle(prompt)
        wanted = [float(row[token]) for row, token in zip(expected_NV, prompt[1:], strict=True)]
        assert logprobs.token_logprobs[0] is None
        assert logprobs.token_logprobs[1:-1] == pytest.approx(wanted, abs=1e-4)
        tops = [max(top.values()) for top in logprobs.top_logprobs[1:-1] if top]
        assert tops == pytest.approx(expected_NV.max(-1).values.tolist(), abs=1e-4)


def test_echo_without_new_tokens(client: openai.OpenAI) -> None:
    found = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, logprobs=0, echo=True)
    choice = found.choices[0]
    assert choice.text == PROMPT
    assert choice.logprobs and choice.logprobs.tokens and choice.logprobs.text_offset
    assert "".join(choice.logprobs.tokens) == PROMPT
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert PROMPT.startswith(token, offset)


def test_log_probabilities_of_new_tokens(
    client: openai.OpenAI, oracle: Callable[[Sequence[int]], torch.Tensor]
) -> None:
    found = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=9, temperature=0, logprobs=5)
    ids = tiny.tokenizer().encode(PROMPT)
    written = tiny.engine().generate(ids, 9)
    rows = oracle([*ids, *written])[len(ids) - 1 :]
    logprobs = found.choices[0].logprobs
    assert logprobs and logprobs.top_logprobs
    assert logprobs.token_logprobs == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)
    for top, row in zip(logprobs.top_logprobs, rows, strict=True):
        assert sorted(top.values(), reverse=True)[:2] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


def test_streams_tell_what_whole_answers_tell(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": [PROMPT, "lazy"],
        "max_tokens": 6,
        "logprobs": 2,
        "echo": True,
        "n": 2,
        "seed": 3,
    }
    whole = client.completions.create(**asked)
    texts, tokens, offsets = [""] * 4, [[], [], [], []], [[], [], [], []]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.token_logprobs or []
                offsets[choice.index] += choice.logprobs.text_offset or []
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.token_logprobs for choice in whole.choices if choice.logprobs]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices if choice.logprobs]


def test_the_best_of_several(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 5, "logprobs": 0, "seed": 7}
    every = client.completions.create(**asked, n=4)
    best = client.completions.create(**asked, n=2, best_of=4)
    means = sorted(
        (sum(choice.logprobs.token_logprobs or []) for choice in every.choices if choice.logprobs), reverse=True
    )
    assert [sum(choice.logprobs.token_logprobs or []) for choice in best.choices if choice.logprobs] == means[:2]
    assert best.usage and best.usage.completion_tokens == 20


def test_vllms_prompt_logprobs(client: openai.OpenAI) -> None:
    ids = tiny.tokenizer().encode(PROMPT)
    found = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 2}
    )
    scored = found.choices[0].model_dump()["prompt_logprobs"]
    assert scored[0] is None and len(scored) == len(ids)
    for token, each in zip(ids[1:], scored[1:], strict=True):
        assert str(token) in each and 2 <= len(each) <= 3
        assert {"logprob", "rank", "decoded_token"} == set(each[str(token)])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 512}, "max_tokens"),
    ],
    ids=str,
)
def test_wrong_values(client: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body={"model": MODEL, "prompt": PROMPT, **change}, cast_to=object)
    assert caught.value.param == param
