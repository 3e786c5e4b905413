"""What clients, frameworks and proxies send beside the usual fields, as raw bodies: taken, or refused by name."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serve.http.conftest import LONG as MODEL
from tests.serve.http.conftest import Server

ASKED: list[Any] = [{"role": "user", "content": "the lazy dog"}]
PARAMETERS: dict[str, Any] = {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]}
NOW: Any = {"type": "function", "function": {"name": "now", "parameters": PARAMETERS}}
DATE: Any = {"type": "function", "function": {"name": "date", "parameters": PARAMETERS}}
FLAT: Any = {"type": "function", "name": "now", "parameters": PARAMETERS, "strict": True}
CLAUDES: Any = {"name": "now", "input_schema": PARAMETERS}
CALL: Any = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
RESULT: Any = {"role": "tool", "tool_call_id": "c1", "content": "noon"}

CHAT: dict[str, dict[str, Any]] = {
    "fields about accounts": {
        "user": "u",
        "store": False,
        "metadata": {"team": "a"},
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_options": {},
        "parallel_tool_calls": True,
        "reasoning_effort": "low",
        "verbosity": "low",
        "modalities": ["text"],
    },
    "fields that say nothing": dict.fromkeys(
        ("stop", "n", "seed", "tools", "tool_choice", "functions", "function_call", "audio", "logit_bias",
         "stream_options", "web_search_options", "prediction", "moderation", "response_format", "top_logprobs")
    ),
    "vLLM's fields": {
        "stop_token_ids": [5],
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "use_beam_search": False,
        "best_of": 1,
        "echo": False,
        "add_special_tokens": False,
        "include_reasoning": True,
        "return_token_ids": False,
        "guided_decoding_backend": "auto",
        "request_id": "r",
    },
    "fields of vLLM and of llama.cpp's server that say what is so": {
        "length_penalty": 1.0,
        "early_stopping": False,
        "detokenize": True,
        "bad_words": [],
        "return_tokens_as_token_ids": False,
        "cache_prompt": True,
        "typical_p": 1.0,
        "mirostat": 0,
    },
    "nothing where vLLM wants a value": dict.fromkeys(
        ("min_tokens", "ignore_eos", "include_stop_str_in_output", "include_reasoning", "add_generation_prompt",
         "continue_final_message", "priority", "experts", "allowed_token_ids", "vllm_xargs",
         "guided_whitespace_pattern")
    ),
    "all there is room for": {"max_tokens": -1, "stop": ["e"]},
    "no alternatives of no probabilities": {"logprobs": False, "top_logprobs": 0},
    "a schema by llama.cpp's name": {"response_format": {"type": "json_schema", "schema": {"enum": ["fox"]}}},
    "a tool to be cached": {"tools": [{**NOW, "cache_control": {"type": "ephemeral"}}]},
    "an answer that goes on": {"messages": [*ASKED, {"role": "assistant", "content": "the", "prefix": True}]},
    "what LiteLLM sends back": {
        "messages": [
            *ASKED,
            {"role": "assistant", "content": "", "function_call": None, "provider_specific_fields": {"refusal": None},
             "tool_calls": [CALL]},
            RESULT,
        ]
    },
    "what OpenAI's client has parsed": {
        "messages": [
            *ASKED,
            {"role": "assistant", "content": "x", "parsed": {"a": 1}, "refusal": None, "tool_calls": [
                {**CALL, "function": {**CALL["function"], "parsed_arguments": {"zone": "UTC"}}}]},
            RESULT,
        ]
    },
    "what other providers and frameworks add": {
        "messages": [
            {"role": "user", "content": "the", "id": "m1", "cache_control": {"type": "ephemeral"}},
            {"role": "assistant", "content": "", "thinking_blocks": [], "tool_calls": [{**CALL, "extra_content": {}}]},
            RESULT,
        ]
    },
    "arguments as an object": {
        "messages": [
            *ASKED,
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "now", "arguments": {"zone": "UTC"}}}]},
            RESULT,
        ]
    },
    "no arguments": {
        "messages": [
            *ASKED,
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "now", "arguments": None}}]},
            RESULT,
        ]
    },
    "usage without a stream": {"stream_options": {"include_usage": True}},
    "an object by llama.cpp's name": {"response_format": {"type": "json_object", "schema": {"enum": ["fox"]}}},
    "the likeliest token alone": {"top_p": 0},
    "tools to choose from": {
        "tools": [NOW, DATE],
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]},
        },
    },
    "no tool in a list": {"tools": []},
    "calls without content": {"messages": [*ASKED, {"role": "assistant", "tool_calls": [CALL]}, RESULT]},
    "calls and tools": {
        "messages": [*ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {**RESULT, "name": "now"}],
        "tools": [NOW],
    },
    "a result in parts": {
        "messages": [
            *ASKED,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {**RESULT, "content": [{"type": "text", "text": "noon"}]},
        ]
    },
    "arguments that a model has spoilt": {
        "messages": [
            *ASKED,
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "now", "arguments": '{"zone'}}]},
            RESULT,
        ]
    },
    "an answer sent back": {
        "messages": [
            *ASKED,
            {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None, "tool_calls": None,
             "function_call": None, "reasoning_content": "hm", "reasoning_details": []},
            *ASKED,
        ]
    },
    "parts, a developer and a name": {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "name": "bob", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]
    },
    "several choices in a stream": {"n": 2, "stream": True, "stream_options": {"include_usage": True}},
}  # fmt: skip

MESSAGES: dict[str, dict[str, Any]] = {
    "what is cached": {"system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]},
    "fields about accounts": {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "inference_geo": "eu",
        "speed": "fast",
    },
    "fields that say nothing": {"mcp_servers": [], "container": None, "context_management": None, "tools": None},
    "a cache's scope": {
        "system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "scope": "global"}}]
    },
    "an answer that is begun by nothing": {"messages": [*ASKED, {"role": "assistant", "content": ""}]},
    "thoughts": {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    "an older place of the format": {"output_format": {"type": "json_schema", "schema": {"enum": ["fox"]}}},
    "a tool": {"tools": [{**CLAUDES, "type": "custom", "defer_loading": False, "allowed_callers": ["direct"]}]},
    "no call": {"tools": [CLAUDES], "tool_choice": {"type": "none"}},
    "one call": {"tools": [CLAUDES], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
}

RESPONSES: dict[str, dict[str, Any]] = {
    "what agents include": {"include": ["reasoning.encrypted_content"], "store": False, "max_tool_calls": 3},
    "fields that say nothing": dict.fromkeys(("conversation", "prompt", "context_management", "previous_response_id")),
    "a reason": {"reasoning": {"effort": "low", "summary": "auto", "generate_summary": None}},
    "tools to choose from": {
        "tools": [FLAT],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}]},
    },
    "a call with all its fields": {
        "input": [
            *ASKED,
            {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{", "id": "fc_1", "async": None,
             "status": "completed", "namespace": None, "caller": None},
            {"type": "function_call_output", "call_id": "c1", "output": "noon"},
        ]
    },
    "an answer and its thoughts": {
        "input": [
            *ASKED,
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None, "content": None,
             "status": None},
            {"type": "message", "id": "m", "role": "assistant", "status": "completed",
             "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}]},
            *ASKED,
        ]
    },
}  # fmt: skip

REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("chat/completions", {"functions": [NOW["function"]]}, "functions", "'functions' is not supported here"),
    ("chat/completions", {"audio": {"voice": "x"}}, "audio", "'audio' is not supported here"),
    ("chat/completions", {"tool_choice": {"type": "functional"}}, "tool_choice", "Input should be"),
    (
        "chat/completions",
        {"tools": [{"type": "function", "function": {}}]},
        "tools.0.function.name",
        "Missing required",
    ),
    ("chat/completions", {"temperature": 2.5}, "temperature", "less than or equal to 2"),
    ("chat/completions", {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ("completions", {"stop_token_ids": [-1], "prompt": "a"}, "stop_token_ids.0", "greater than or equal to 0"),
    ("messages", {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]}, None, "web_search"),
    ("messages", {"tools": [{**CLAUDES, "colour": "red"}]}, None, "tools.0.colour"),
    ("messages", {"messages": [{"role": "user", "content": ""}]}, None, "non-empty content"),
    ("messages", {"mcp_servers": [{"url": "x"}]}, None, "mcp_servers"),
    ("messages", {"messages": [*ASKED, {"role": "assistant", "content": ""}, *ASKED]}, None, "non-empty content"),
    ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "items here are of the types message"),
    ("responses", {"input": ASKED, "conversation": "conv_1"}, "conversation", "not supported here"),
]


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.url}/v1", timeout=60) as client:
        yield client


@pytest.mark.parametrize("given", CHAT.values(), ids=list(CHAT))
def test_chat_completions_take(http: httpx.Client, given: dict[str, Any]) -> None:
    answer = http.post("chat/completions", json={"model": MODEL, "messages": ASKED, "max_tokens": 4, **given})
    assert answer.status_code == 200, answer.text
    assert "error" not in answer.text


@pytest.mark.parametrize("given", MESSAGES.values(), ids=list(MESSAGES))
def test_messages_take(http: httpx.Client, given: dict[str, Any]) -> None:
    answer = http.post("messages?beta=true", json={"model": MODEL, "messages": ASKED, "max_tokens": 4, **given})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("given", RESPONSES.values(), ids=list(RESPONSES))
def test_responses_take(http: httpx.Client, given: dict[str, Any]) -> None:
    answer = http.post("responses", json={"model": MODEL, "input": "the", "max_output_tokens": 4, **given})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("path", "given", "param", "words"), REFUSED, ids=[str(row[1]) for row in REFUSED])
def test_refused_by_name(http: httpx.Client, path: str, given: dict[str, Any], param: str | None, words: str) -> None:
    usual = {"responses": {"input": "the"}, "completions": {}, "messages": {"messages": ASKED, "max_tokens": 4}}
    answer = http.post(path, json={"model": MODEL, **usual.get(path, {"messages": ASKED}), **given})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert words in error["message"] and error.get("param") == param


def test_all_there_is_room_for(http: httpx.Client) -> None:
    asked = {"model": "tiny", "prompt": "the lazy dog", "max_tokens": -1, "ignore_eos": True, "temperature": 0}
    limit = http.get("models/tiny").json()["max_model_len"]
    used = http.post("completions", json=asked).json()["usage"]
    assert used["total_tokens"] == limit


def test_an_answer_goes_on_from_its_prefix(http: httpx.Client) -> None:
    begun = [*ASKED, {"role": "assistant", "content": "the lazy"}]
    asked = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    marked = [*ASKED, {**begun[1], "prefix": True}]
    going_on = {"messages": begun, "add_generation_prompt": False, "continue_final_message": True}
    by_prefix = http.post("chat/completions", json={**asked, "messages": marked}).json()
    assert by_prefix["choices"] == http.post("chat/completions", json={**asked, **going_on}).json()["choices"]
    anew = http.post("chat/completions", json={**asked, "messages": begun}).json()
    assert by_prefix["usage"]["prompt_tokens"] < anew["usage"]["prompt_tokens"]


def test_the_count_of_what_a_beta_sends(http: httpx.Client) -> None:
    more = {"thinking": {"type": "disabled"}, "context_management": {"edits": []}, "mcp_servers": [], "speed": None}
    counted = [
        http.post("messages/count_tokens?beta=true", json={"model": MODEL, "messages": ASKED, **each}).json()
        for each in ({}, more)
    ]
    assert counted[0] == counted[1] and counted[0]["input_tokens"] > 0


@pytest.mark.parametrize(
    ("path", "right"),
    [("/chat/completions", "/v1/chat/completions"), ("/v1/v1/messages", "/v1/messages"),
     ("/v1//completions", "/v1/completions"), ("/v2/completions", None), ("/v1", None)],
)  # fmt: skip
def test_a_wrong_base_url_is_told(server: Server, path: str, right: str | None) -> None:
    answer = httpx.post(f"{server.url}{path}", json={})
    hint = f"; {right} is here: check the client's base URL" if right else ""
    assert answer.status_code == 404 and answer.json()["error"]["message"] == f"unknown path: POST {path}{hint}"


def test_a_token_that_ends(http: httpx.Client) -> None:
    asked = {"model": MODEL, "prompt": "the lazy dog", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    whole = http.post("completions", json={**asked, "logprobs": 0}).json()["choices"][0]
    ids = http.post("../tokenize", json={"model": MODEL, "prompt": whole["text"], "add_special_tokens": False}).json()
    chosen = http.post("completions", json={**asked, "stop_token_ids": ids["tokens"]}).json()["choices"][0]
    assert chosen["finish_reason"] == "stop" and chosen["stop_reason"] in ids["tokens"]


def test_the_object_that_a_schema_describes(http: httpx.Client) -> None:
    wanted = {"type": "json_object", "schema": {"enum": ["fox"]}}
    answer = http.post(
        "chat/completions", json={"model": MODEL, "messages": ASKED, "max_tokens": 40, "response_format": wanted}
    )
    assert answer.json()["choices"][0]["message"]["content"].strip() == '"fox"'


def test_tokens_of_an_input(http: httpx.Client) -> None:
    given = {"model": MODEL, "input": "the lazy dog", "instructions": "Be brief."}
    counted = http.post("responses/input_tokens", json=given).json()
    used = http.post("responses", json={**given, "max_output_tokens": 1}).json()["usage"]
    assert counted == {"object": "response.input_tokens", "input_tokens": used["input_tokens"]}


def test_a_conversation_is_cut_to_fit(http: httpx.Client) -> None:
    said = [{"role": "user", "content": f"{number} " + "the lazy dog " * 60} for number in range(40)]
    given = {"model": MODEL, "input": said, "max_output_tokens": 8}
    assert http.post("responses", json=given).json()["error"]["code"] == "context_length_exceeded"
    answer = http.post("responses", json={**given, "truncation": "auto"}).json()
    one = http.post("responses", json={**given, "input": said[-1:]}).json()["usage"]["input_tokens"]
    assert 4096 - 8 - one <= answer["usage"]["input_tokens"] <= 4096 - 8


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"{}", "text/plain", "content-type: application/json"),
        (b"", "application/json", "the body is empty"),
        (b"[]", "application/json", "no JSON object but a list"),
    ],
)
def test_bodies_that_are_no_objects(http: httpx.Client, body: bytes, kind: str, words: str) -> None:
    answer = http.post("chat/completions", content=body, headers={"content-type": kind})
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]
