"""/v1/chat/completions, asked by the official client."""

import asyncio
from typing import Any

import openai
import pytest

from moesaic.data.chat import render_chat
from tests.serve import tiny
from tests.serve.http.conftest import MODEL, Server

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the lazy dog"}]


def expected(count: int, messages: list[Any] = MESSAGES) -> str:
    ids = tiny.tokenizer().encode(render_chat(tiny.TEMPLATE, messages))
    return tiny.tokenizer().decode(tiny.engine().generate(ids, count))


def test_an_answer(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, temperature=0)
    choice = found.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (expected(12), "assistant", "length")
    assert found.usage and found.usage.completion_tokens == 12
    assert found.usage.prompt_tokens_details and found.usage.prompt_tokens_details.cached_tokens is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + 12


def test_a_streamed_answer(client: openai.OpenAI) -> None:
    text = expected(30)
    with client.chat.completions.stream(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=30,
        temperature=0,
        stop=text[12:15],
        stream_options={"include_usage": True},
    ) as stream:
        said = "".join(event.delta for event in stream if event.type == "content.delta")
        whole = stream.get_final_completion()
    assert said == whole.choices[0].message.content == text[: text.index(text[12:15])]
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage and whole.usage.completion_tokens > 0


def test_many_at_once(server: Server) -> None:
    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asked = [
                client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5 + index, temperature=0)
                for index in range(6)
            ]
            return [found.choices[0].message.content for found in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [expected(5 + index) for index in range(6)]


def test_streamed_at_once(server: Server) -> None:
    async def ask(client: openai.AsyncOpenAI, size: int) -> str:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=size, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, size) for size in (1, 7, 20)))

    assert asyncio.run(ask_all()) == [expected(size) for size in (1, 7, 20)]


def test_parts_developers_and_answers_sent_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4, temperature=0)
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "dog"}], "name": "me"},
        first.choices[0].message.model_dump(),
        {"role": "user", "content": "again"},
    ]
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "the\ndog"},
        {"role": "assistant", "content": expected(4)},
        {"role": "user", "content": "again"},
    ]
    found = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, temperature=0)
    assert found.choices[0].message.content == expected(4, plain)


def test_a_final_message_is_gone_on_with(client: openai.OpenAI) -> None:
    messages: list[Any] = [MESSAGES[1], {"role": "assistant", "content": "It is"}]
    body = {"continue_final_message": True, "add_generation_prompt": False}
    found = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=6, temperature=0, extra_body=body)
    ids = tiny.tokenizer().encode("<|im_start|>user\nthe lazy dog<|im_end|>\n<|im_start|>assistant\nIt is")
    assert found.choices[0].message.content == tiny.tokenizer().decode(tiny.engine().generate(ids, 6))


def test_logprobs(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 6
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy
    data = b"".join(bytes(token.bytes or []) for token in logprobs.content)
    assert data.decode(errors="replace") == found.choices[0].message.content


def test_streamed_logprobs_are_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    parts = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**asked, stream=True)]
    tokens = [token for part in parts if part is not None for token in part.content or ()]
    assert whole.choices[0].logprobs is not None
    assert tokens == whole.choices[0].logprobs.content


def test_several_choices_with_a_seed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "n": 3, "seed": 5}
    first, second = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_stop_texts(client: openai.OpenAI) -> None:
    text = expected(30)
    stop = text[10:13]
    found = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=30, temperature=0, stop=stop)
    assert found.choices[0].message.content == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_the_experts_of_an_answer(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=7, temperature=0, extra_body={"experts": True}
    )
    assert found.usage is not None
    activation = found.usage.model_dump()["expert_activation"]
    assert sorted(activation) == ["0", "1"]
    for counts in activation.values():
        assert sum(counts.values()) >= 2 * 7 and set(counts) <= set("01234")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"n": 10**6}, "n"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["x"] * 99}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"stream": "yes"}, "stream"),
    ],
    ids=str,
)
def test_wrong_values(client: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, **change}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", param)


def test_an_unknown_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument supplied: foo") as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"foo": 1})
    assert caught.value.param == "foo"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_what_is_no_text_is_refused_by_name(client: openai.OpenAI, kind: str) -> None:
    messages: list[Any] = [{"role": "user", "content": [{"type": kind, kind: {"url": "https://example.com/x.png"}}]}]
    with pytest.raises(openai.BadRequestError, match=f"{kind} is not supported"):
        client.chat.completions.create(model=MODEL, messages=messages)


def test_a_prompt_over_the_context(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "fox " * 600}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as caught:
        client.chat.completions.create(model=MODEL, messages=messages)
    assert caught.value.code == "context_length_exceeded"


def test_more_tokens_than_the_context_has(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=512)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_completion_tokens")
