"""/v1/messages, asked by the official client."""

import asyncio
from typing import Any

import anthropic
import pytest

from tests.serve.http.conftest import LONG, MODEL, Server
from tests.serve.http.test_openai_chat import expected

ASKED: list[Any] = [{"role": "user", "content": "the lazy dog"}]
SYSTEM = "Be brief."
GREEDY = {"temperature": 0}


def create(claude: anthropic.Anthropic, **more: Any) -> anthropic.types.Message:
    given: dict[str, Any] = {"model": MODEL, "messages": ASKED, "system": SYSTEM, "max_tokens": 12, **more}
    return claude.messages.create(**given, extra_body=GREEDY)


def test_a_message(claude: anthropic.Anthropic) -> None:
    found = create(claude)
    assert [block.type for block in found.content] == ["text"]
    assert found.content[0].type == "text" and found.content[0].text == expected(12)
    assert (found.role, found.model, found.stop_reason) == ("assistant", MODEL, "max_tokens")
    assert found.usage.output_tokens == 12
    assert found.usage.input_tokens + (found.usage.cache_read_input_tokens or 0) > 12


def test_a_streamed_message(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model=MODEL, messages=ASKED, system=SYSTEM, max_tokens=12, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        whole = stream.get_final_message()
    assert text == expected(12)
    assert whole.content[0].type == "text" and whole.content[0].text == text
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 12)


def test_events_come_in_their_order(claude: anthropic.Anthropic) -> None:
    stream = claude.messages.create(model=MODEL, messages=ASKED, max_tokens=3, stream=True)
    kinds = [event.type for event in stream if event.type != "content_block_delta"]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]


def test_many_at_once(server: Server) -> None:
    async def ask(client: anthropic.AsyncAnthropic, size: int) -> str:
        async with client.messages.stream(
            model=MODEL, messages=ASKED, system=SYSTEM, max_tokens=size, extra_body=GREEDY
        ) as stream:
            return "".join([text async for text in stream.text_stream])

    async def ask_all() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, size) for size in (1, 7, 20)))

    assert asyncio.run(ask_all()) == [expected(size) for size in (1, 7, 20)]


def test_blocks_tools_and_results_are_read(claude: anthropic.Anthropic) -> None:
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "the", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "tool_use", "id": "t1", "name": "now", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "noon"}]},
                {"type": "text", "text": "and?"},
            ],
        },
    ]
    tools: list[Any] = [{"name": "now", "input_schema": {"type": "object", "properties": {}}}]
    counted = claude.messages.count_tokens(model=MODEL, messages=messages, tools=tools)
    found = create(claude, messages=messages, tools=tools, system=anthropic.omit, max_tokens=2)
    assert counted.input_tokens == found.usage.input_tokens + (found.usage.cache_read_input_tokens or 0)


def test_a_message_to_go_on_with(claude: anthropic.Anthropic) -> None:
    whole = create(claude).content[0]
    assert whole.type == "text"
    begun = whole.text[:4].rstrip()
    found = create(claude, messages=[*ASKED, {"role": "assistant", "content": begun}], max_tokens=4)
    plain = create(claude, messages=[*ASKED, {"role": "assistant", "content": begun}, ASKED[0]], max_tokens=4)
    assert found.usage.input_tokens + (found.usage.cache_read_input_tokens or 0) < plain.usage.input_tokens + (
        plain.usage.cache_read_input_tokens or 0
    )


def test_a_runner_of_tools_sends_the_whole_conversation(claude: anthropic.Anthropic) -> None:
    """It asks for a thread, which the server keeps; told that there are none, it goes on without."""

    @anthropic.beta_tool
    def now(zone: str) -> str:
        """The time.

        Args:
            zone: of the world
        """
        return "noon"

    given: dict[str, Any] = {"model": LONG, "messages": ASKED, "max_tokens": 8}
    answer = claude.beta.messages.tool_runner(**given, tools=[now]).until_done()
    assert answer.stop_reason == "max_tokens"
    with pytest.raises(anthropic.types.ThreadUnsupportedRequestError, match="send all messages") as refused:
        claude.beta.messages.create(**given, thread={"type": "create"})
    assert refused.value.details.unsupported == ["thread"]


def test_stop_sequences(claude: anthropic.Anthropic) -> None:
    text = expected(30)
    found = create(claude, max_tokens=30, stop_sequences=[text[10:13]])
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", text[10:13])
    assert found.content[0].type == "text" and found.content[0].text == text[: text.index(text[10:13])]


def test_more_tokens_than_the_context_has(claude: anthropic.Anthropic) -> None:
    found = create(claude, messages=[{"role": "user", "content": "fox " * 90}], max_tokens=8000)
    read = found.usage.input_tokens + (found.usage.cache_read_input_tokens or 0)
    assert found.stop_reason == "model_context_window_exceeded"
    assert read + found.usage.output_tokens == 512
    with pytest.raises(anthropic.BadRequestError, match="maximum context length is 512"):
        create(claude, messages=[{"role": "user", "content": "fox " * 600}], max_tokens=8000)


def test_an_unknown_model(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        create(claude, model="nobody")
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 0},
        {"max_tokens": "many"},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]},
        {"tool_choice": {"type": "tool"}},
        {"tool_choice": {"type": "any"}},
        {"tools": [{"name": "two words", "input_schema": {}}]},
        {"temperature": 2},
        {"who": "me"},
    ],
    ids=str,
)
def test_wrong_values(claude: anthropic.Anthropic, change: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": ASKED, "max_tokens": 2, **change}
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.post("/v1/messages", body=body, cast_to=object)
    error: Any = caught.value.body
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
