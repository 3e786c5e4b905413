"""Formats with marks around JSON: Hermes', Mistral's, Granite's, DeepSeek-V3's and Kimi's."""

from collections.abc import Sequence

from moesaic.serve.tools.json_calls import listed, marked_object, whole_call
from moesaic.serve.tools.parts import CallArguments, CallBegun, Parts, Said, Tool
from moesaic.serve.tools.source import Source, each_as


def hermes(source: Source, tools: Sequence[Tool]) -> Parts:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, as Qwen and many others write it."""
    while True:
        mark = yield from each_as(Said, source.until("<tool_call>"))
        if not mark:
            return
        yield from marked_object(source, mark, "</tool_call>")


def granite(source: Source, tools: Sequence[Tool]) -> Parts:
    """<|tool_call|>[{"name": ..., "arguments": {...}}, ...]."""
    while True:
        mark = yield from each_as(Said, source.until("<|tool_call|>"))
        if not mark:
            return
        following = yield from source.spaces()
        if following == "[":
            yield from listed(source, mark)
        else:
            yield Said(mark)


def mistral(source: Source, tools: Sequence[Tool]) -> Parts:
    """[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or since 2025 [TOOL_CALLS]name[ARGS]{...} for each."""
    while True:
        mark = yield from each_as(Said, source.until("[TOOL_CALLS]"))
        if not mark:
            return
        following = yield from source.spaces()
        if following == "[":
            yield from listed(source, mark)
        elif following == "{":
            text, _ = yield from source.all_until("[TOOL_CALLS]")
            yield from whole_call(text) or [Said(mark + text)]
        elif following:
            yield from _named(source)


def _named(source: Source) -> Parts:
    """A name, maybe an identity, and the arguments."""
    header, mark = yield from source.all_until("[CALL_ID]", "[ARGS]", "{")
    identity = None
    if mark == "[CALL_ID]":
        identity, mark = yield from source.all_until("[ARGS]")
    if mark == "{":
        source.text = mark + source.text
    yield CallBegun(header.strip(), identity)
    yield from each_as(CallArguments, source.json_value())


def deepseek(source: Source, tools: Sequence[Tool]) -> Parts:
    """Between marks, a type, a separator, a name and fenced JSON (V3, R1), or a name, a separator and JSON (V3.1)."""
    while True:
        mark = yield from each_as(Said, source.until("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"))
        if not mark:
            return
        if mark == "<｜tool▁calls▁begin｜>":
            yield from _deepseek_calls(source)
        else:
            yield from _deepseek_call(source)


def _deepseek_calls(source: Source) -> Parts:
    while True:
        _, mark = yield from source.all_until("<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>")
        if mark != "<｜tool▁call▁begin｜>":
            return
        yield from _deepseek_call(source)


def _deepseek_call(source: Source) -> Parts:
    header, _ = yield from source.all_until("<｜tool▁sep｜>")
    following = yield from source.spaces()
    if following != "{":
        header, mark = yield from source.all_until("```json", "<｜tool▁call▁end｜>")
        if mark != "```json":
            return
    yield CallBegun(header.strip())
    yield from source.spaces()
    yield from each_as(CallArguments, source.json_value())
    yield from source.all_until("<｜tool▁call▁end｜>")


def kimi(source: Source, tools: Sequence[Tool]) -> Parts:
    """functions.name:0 and JSON, between marks of their own in a section."""
    while True:
        mark = yield from each_as(Said, source.until("<|tool_calls_section_begin|>"))
        if not mark:
            return
        yield from _kimi_section(source)


def _kimi_section(source: Source) -> Parts:
    while True:
        _, mark = yield from source.all_until("<|tool_call_begin|>", "<|tool_calls_section_end|>")
        if mark != "<|tool_call_begin|>":
            return
        identity, mark = yield from source.all_until("<|tool_call_argument_begin|>")
        if not mark:
            return
        identity = identity.strip()
        yield CallBegun(identity.removeprefix("functions.").rsplit(":", 1)[0], identity)
        yield from source.spaces()
        yield from each_as(CallArguments, source.json_value())
        yield from source.all_until("<|tool_call_end|>")
