"""Tools and schemas, asked by the official clients. Random weights call only what a grammar makes them call."""

import json
from typing import Any

import anthropic
import jsonschema
import openai
import pydantic
import pytest

from tests.serve.http.conftest import LONG as MODEL

ASKED: list[Any] = [{"role": "user", "content": "What time is it?"}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"zone": {"enum": ["UTC", "CET"]}, "exact": {"type": "boolean"}},
    "required": ["zone", "exact"],
    "additionalProperties": False,
}
NOW: Any = {"type": "function", "function": {"name": "now", "description": "the time", "parameters": PARAMETERS}}
DATE: Any = {"type": "function", "function": {"name": "date", "parameters": PARAMETERS}}


class Time(pydantic.BaseModel):
    late: bool
    zone: pydantic.constr(pattern="^(UTC|CET)$")  # pyright: ignore[reportInvalidTypeForm]


def check(arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), PARAMETERS)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_named_tool(client: openai.OpenAI, seed: int) -> None:
    found = client.chat.completions.create(
        model=MODEL,
        messages=ASKED,
        tools=[NOW, DATE],
        tool_choice={"type": "function", "function": {"name": "date"}},
        max_tokens=400,
        seed=seed,
    )
    choice = found.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    call = choice.message.tool_calls[0]
    assert call.type == "function" and call.function.name == "date" and len(choice.message.tool_calls) == 1
    check(call.function.arguments)


def test_a_required_tool_is_streamed(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=ASKED,
        tools=[NOW, DATE],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=400,
        seed=3,
    ) as stream:
        events = list(stream)
        whole = stream.get_final_completion().choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.tool_calls
    (call,) = whole.message.tool_calls
    assert call.function.name in ("now", "date") and call.id
    check(call.function.arguments)
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(event.arguments_delta for event in deltas) == call.function.arguments
    assert len(deltas) > 2


def test_a_call_and_its_result_go_back(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "tools": [NOW], "max_tokens": 400, "seed": 1}
    first = client.chat.completions.create(**asked, messages=ASKED, tool_choice="required", parallel_tool_calls=False)
    message = first.choices[0].message
    assert message.tool_calls
    results: list[Any] = [{"role": "tool", "tool_call_id": call.id, "content": "noon"} for call in message.tool_calls]
    second = client.chat.completions.create(**asked, messages=[*ASKED, message, *results])
    assert second.usage and first.usage and second.usage.prompt_tokens > first.usage.prompt_tokens


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_schema(client: openai.OpenAI, seed: int) -> None:
    found = client.chat.completions.parse(model=MODEL, messages=ASKED, response_format=Time, max_tokens=200, seed=seed)
    parsed = found.choices[0].message.parsed
    assert isinstance(parsed, Time) and found.choices[0].finish_reason == "stop"


def test_any_json(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model=MODEL,
        messages=ASKED,
        response_format={"type": "json_object"},
        max_tokens=400,
        seed=1,
        frequency_penalty=2,
    )
    choice = found.choices[0]
    assert choice.message.content and choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("field", "texts"),
    [
        ({"structured_outputs": {"choice": ["yes, sir", "no (never)"]}}, {"yes, sir", "no (never)"}),
        ({"guided_choice": ["a/b", "ä"]}, {"a/b", "ä"}),
        ({"guided_regex": "x{3}|y"}, {"xxx", "y"}),
        ({"guided_json": {"const": 17}}, {"17"}),
        ({"guided_grammar": 'start: "up" | "down"'}, {"up", "down"}),
    ],
    ids=["structured_outputs", "guided_choice", "guided_regex", "guided_json", "guided_grammar"],
)
def test_vllms_fields(client: openai.OpenAI, field: dict[str, Any], texts: set[str]) -> None:
    found = client.completions.create(model=MODEL, prompt="so", max_tokens=30, seed=1, extra_body=field)
    assert found.choices[0].text in texts


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "field",
    [
        {"guided_regex": "("},
        {"guided_json": {"type": "thing"}},
        {"guided_json": {"allOf": [{"const": 1}, {"const": 2}]}},
        {"guided_grammar": "start: nothing"},
        {"guided_regex": "x", "guided_json": {}},
    ],
    ids=str,
)
def test_grammars_that_cannot_be_met(client: openai.OpenAI, field: dict[str, Any], stream: bool) -> None:
    body = {"model": MODEL, "prompt": "so", "max_tokens": 30, "stream": stream, **field}
    with pytest.raises(openai.BadRequestError):
        client.post("/completions", body=body, cast_to=object)


def test_responses_call_tools(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "now", "parameters": PARAMETERS, "strict": True}
    with client.responses.stream(
        model=MODEL,
        input="time?",
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=400,
    ) as stream:
        events = list(stream)
        whole = stream.get_final_response()
    (call,) = whole.output
    assert call.type == "function_call" and call.name == "now" and whole.status == "completed"
    check(call.arguments)
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == [call.arguments]


def test_responses_of_a_schema(client: openai.OpenAI) -> None:
    found = client.responses.parse(model=MODEL, input="time?", text_format=Time, max_output_tokens=200)
    assert isinstance(found.output_parsed, Time)


def test_messages_use_tools(claude: anthropic.Anthropic) -> None:
    tools: list[Any] = [{"name": "now", "input_schema": PARAMETERS}]
    asked: dict[str, Any] = {"model": MODEL, "messages": ASKED, "tools": tools, "max_tokens": 400}
    found = claude.messages.create(**asked, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    (block,) = found.content
    assert found.stop_reason == "tool_use" and block.type == "tool_use" and block.name == "now"
    jsonschema.validate(block.input, PARAMETERS)
    with claude.messages.stream(**asked, tool_choice={"type": "tool", "name": "now"}) as stream:
        list(stream)
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use"
    jsonschema.validate(streamed.input, PARAMETERS)
