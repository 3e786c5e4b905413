"""/v1/responses, asked by the official client."""

import asyncio
from typing import Any

import openai
import pytest

from tests.serve.http.conftest import MODEL, Server
from tests.serve.http.test_openai_chat import MESSAGES, expected

ASKED: dict[str, Any] = {
    "model": MODEL,
    "instructions": "Be brief.",
    "input": "the lazy dog",
    "max_output_tokens": 12,
    "temperature": 0,
}


def test_a_response(client: openai.OpenAI) -> None:
    found = client.responses.create(**ASKED)
    assert found.output_text == expected(12)
    assert (found.status, found.object, found.model) == ("incomplete", "response", MODEL)
    assert found.incomplete_details and found.incomplete_details.reason == "max_output_tokens"
    assert found.usage and found.usage.output_tokens == 12
    assert found.usage.total_tokens == found.usage.input_tokens + 12


def test_a_streamed_response(client: openai.OpenAI) -> None:
    with client.responses.stream(**ASKED) as stream:
        events = list(stream)
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected(12)
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.output_text == expected(12)


def test_asynchronously(server: Server) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.responses.create(**ASKED, stream=True)
            return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

    assert asyncio.run(ask()) == expected(12)


def test_gone_on_from(client: openai.OpenAI) -> None:
    first = client.responses.create(**ASKED)
    asked = {**ASKED, "input": [{"role": "user", "content": [{"type": "input_text", "text": "again"}]}]}
    second = client.responses.create(**asked, previous_response_id=first.id)
    messages = [*MESSAGES, {"role": "assistant", "content": expected(12)}, {"role": "user", "content": "again"}]
    assert second.output_text == expected(12, messages)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**asked, previous_response_id=first.id)
    assert caught.value.code == "previous_response_not_found"


def test_what_is_not_stored_is_not_kept(client: openai.OpenAI) -> None:
    found = client.responses.create(**ASKED, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(found.id)


def test_items_sent_back(client: openai.OpenAI) -> None:
    first = client.responses.create(**ASKED)
    items: list[Any] = [
        {"role": "user", "content": "the lazy dog"},
        *[item.model_dump() for item in first.output],
        {"role": "user", "content": "again"},
    ]
    messages = [*MESSAGES, {"role": "assistant", "content": expected(12)}, {"role": "user", "content": "again"}]
    assert client.responses.create(**{**ASKED, "input": items}).output_text == expected(12, messages)


def test_logprobs(client: openai.OpenAI) -> None:
    found = client.responses.create(**ASKED, include=["message.output_text.logprobs"], top_logprobs=2)
    item = found.output[0]
    assert item.type == "message" and item.content[0].type == "output_text"
    logprobs = item.content[0].logprobs
    assert logprobs is not None and len(logprobs) == 12
    assert all(len(token.top_logprobs) == 2 for token in logprobs)


def test_calls_and_their_outputs_are_read(client: openai.OpenAI) -> None:
    items: list[Any] = [
        {"role": "user", "content": "time?"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "noon"},
    ]
    tools: list[Any] = [{"type": "function", "name": "now", "parameters": {"type": "object"}, "strict": False}]
    found = client.responses.create(**{**ASKED, "input": items}, tools=tools)
    assert found.usage and found.usage.output_tokens == 12


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 513}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"background": True}, "background"),
        ({"include": ["thoughts"]}, "include.0"),
        ({"wishes": 3}, "wishes"),
        ({"previous_response_id": "resp_nothing"}, "previous_response_id"),
    ],
    ids=str,
)
def test_wrong_values(client: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", body={**ASKED, **change}, cast_to=object)
    assert caught.value.param == param
