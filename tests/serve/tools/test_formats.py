"""Answers as the families' models write them, whole and in every kind of pieces."""

import json
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.serve.text.reasoning import MARKS, AnswerParser
from moesaic.serve.tools.formats import FORMATS, format_of
from moesaic.serve.tools.parts import CallArguments, CallBegun, Part, Said, Thought, Tool

WEATHER = Tool(
    "get_weather",
    "",
    {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
)
TOOLS = (WEATHER, Tool("now", "", {"type": "object"}))
CALL = ("get_weather", {"city": 'São {Paulo} "x"', "days": 2})
JSON = json.dumps(CALL[1], ensure_ascii=False)


class Case(NamedTuple):
    form: str
    text: str
    said: str = ""
    calls: tuple[tuple[str, Any], ...] = (CALL,)
    thought: str = ""


CASES = {
    "hermes": Case(
        "hermes",
        f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>',
        "Let me see.",
    ),
    "hermes, two": Case(
        "hermes",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>\n'
        '<tool_call>\n{"name":"now","arguments":{}}\n</tool_call>\n',
        calls=(CALL, ("now", {})),
    ),
    "hermes, arguments first": Case(
        "hermes", f'<tool_call>{{"arguments": {JSON}, "name": "get_weather"}}</tool_call>Done. ', "Done. "
    ),
    "hermes, arguments as text": Case(
        "hermes", f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(JSON)}}}</tool_call>'
    ),
    "hermes, no JSON": Case("hermes", "<tool_call>\nnone\n</tool_call>", "<tool_call>\nnone\n</tool_call>", ()),
    "hermes, cut short": Case("hermes", '<tool_call>\n{"name": "now", "arguments": {}', calls=(("now", {}),)),
    "hermes, half a mark": Case("hermes", "a <tool_cal", "a <tool_cal", ()),
    "qwen3_coder": Case(
        "qwen3_coder",
        'I will.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nSão {Paulo} "x"\n</parameter>\n'
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        "I will.",
    ),
    "qwen3_coder, no arguments": Case(
        "qwen3_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", calls=(("now", {}),)
    ),
    "minimax": Case(
        "minimax",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">São {Paulo} "x"</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        calls=(CALL, ("now", {})),
    ),
    "deepseek_v32": Case(
        "deepseek_v32",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">'
        'São {Paulo} "x"</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
    ),
    "deepseek_v3": Case(
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        f"{JSON}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        calls=(CALL, ("now", {})),
    ),
    "deepseek_v31": Case(
        "deepseek_v31",
        f"Yes.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Yes.",
    ),
    "kimi": Case(
        "kimi",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{JSON}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        calls=(CALL, ("now", {})),
    ),
    "mistral": Case(
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {JSON}}}, {{"name": "now", "arguments": {{}}}}]',
        calls=(CALL, ("now", {})),
    ),
    "mistral, identities": Case(
        "mistral", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {JSON}, "id": "VvvODy9mT"}}]'
    ),
    "mistral_args": Case(
        "mistral_args", f"Hm. [TOOL_CALLS]get_weather[ARGS]{JSON}[TOOL_CALLS]now[ARGS]{{}}", "Hm.", (CALL, ("now", {}))
    ),
    "mistral, call ids": Case("mistral_args", f"[TOOL_CALLS]get_weather[CALL_ID]123456789[ARGS]{JSON}"),
    "granite": Case("granite", f'<|tool_call|>[{{"name": "get_weather", "arguments": {JSON}}}]'),
    "glm": Case(
        "glm",
        'Sure.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>São {Paulo} "x"</arg_value>\n'
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        "Sure.",
    ),
    "llama4, JSON": Case("llama4", f'<|python_start|>{{"name": "get_weather", "parameters": {JSON}}}<|python_end|>'),
    "llama4, Python": Case(
        "llama4", "[get_weather(city='São {Paulo} \"x\"', days=2), now()]", calls=(CALL, ("now", {}))
    ),
    "llama4, a list": Case("llama4", "[1] is a source.", "[1] is a source.", ()),
    "llama4, not a tool": Case("llama4", "[exec(x=1)]", "[exec(x=1)]", ()),
    "llama4, code": Case("llama4", "[now(x=__import__('os'))]", "[now(x=__import__('os'))]", ()),
    "harmony": Case(
        "harmony",
        "<|channel|>analysis<|message|>Need weather.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.get_weather <|constrain|>json<|message|>{JSON}<|call|>",
        thought="Need weather.",
    ),
    "harmony, final": Case(
        "harmony",
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Four.",
        "Four.",
        (),
        "Easy.",
    ),
    "harmony, no header": Case("harmony", "Four.", "Four.", ()),
    "thinking": Case(
        "hermes",
        f'<think>\nWeather?\n</think>\n\n<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>',
        thought="Weather?",
    ),
    "thinking, no end": Case("hermes", "<think>\nWea", calls=(), thought="Wea"),
    "thinking, then words": Case("hermes", "<think>a\n\nb\n</think>\n\nHi  there.\n", "Hi  there.\n", (), "a\n\nb"),
    "only words": Case("hermes", "\n a < b ", "\n a < b ", ()),
}


def parser(case: Case) -> AnswerParser:
    form = FORMATS[case.form]
    return AnswerParser(MARKS[0], False, lambda source: form.parse(source, TOOLS))


def summed(parts: list[Part]) -> tuple[str, str, list[tuple[str, Any]]]:
    said = "".join(part.text for part in parts if isinstance(part, Said))
    thought = "".join(part.text for part in parts if isinstance(part, Thought))
    calls: list[list[str]] = []
    for part in parts:
        if isinstance(part, CallBegun):
            calls.append([part.name, ""])
        elif isinstance(part, CallArguments):
            calls[-1][1] += part.text
    return said, thought, [(name, json.loads(text)) for name, text in calls]


@pytest.mark.parametrize("name", CASES)
def test_whole_answers(name: str) -> None:
    case = CASES[name]
    it = parser(case)
    assert summed([*it.feed(case.text), *it.close()]) == (case.said, case.thought, list(case.calls))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_answers_in_pieces(name: str, size: int) -> None:
    case = CASES[name]
    it, parts = parser(case), []
    for place in range(0, len(case.text), size):
        parts += it.feed(case.text[place : place + size])
    assert summed([*parts, *it.close()]) == (case.said, case.thought, list(case.calls))


@settings(max_examples=100)
@given(name=st.sampled_from(sorted(FORMATS)), data=st.data())
def test_whatever_comes_is_read_alike_in_pieces(name: str, data: st.DataObject) -> None:
    marks = [mark for case in CASES.values() for mark in case.text.replace(">", "> ").split(" ") if mark]
    text = "".join(data.draw(st.lists(st.sampled_from([*marks, " ", "\n", "{", "}", '"', "x"]), max_size=12)))
    whole, pieced = parser(Case(name, text)), parser(Case(name, text))
    one, parts = [*whole.feed(text), *whole.close()], []
    for character in text:
        parts += pieced.feed(character)
    parts += pieced.close()
    assert joined(one) == joined(parts)


def joined(parts: list[Part]) -> list[tuple[str, str]]:
    """Neighbours of one kind as one; what is said is compared without spaces, which may be let go in pieces."""
    found: list[tuple[str, str]] = []
    for part in parts:
        kind = type(part).__name__
        text = part.name if isinstance(part, CallBegun) else part.text
        if found and found[-1][0] == kind and kind != "CallBegun":
            text = found.pop()[1] + text
        found.append((kind, text))
    return found


def test_arguments_come_before_the_call_ends() -> None:
    it = parser(CASES["hermes"])
    parts = it.feed('<tool_call>\n{"name": "now", "arguments": {"a": [1, ')
    assert parts == [CallBegun("now"), CallArguments('{"a": [1, ')]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_format_is_found_by_its_marks(name: str) -> None:
    assert format_of("{{ x }} " + " ".join(FORMATS[name].marks)) == name


def test_a_template_without_tools_gets_the_generic_format() -> None:
    assert format_of("{{ messages }}") == "hermes"
