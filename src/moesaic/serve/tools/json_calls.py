"""Calls that are written as JSON: {"name": ..., "arguments": {...}}, between marks or in lists."""

import json
import re
from collections.abc import Generator
from typing import Any

from moesaic.serve.tools.parts import CallArguments, CallBegun, Part, Parts, Said
from moesaic.serve.tools.source import Source, each_as

_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


def marked_object(source: Source, opening: str, closing: str) -> Parts:
    """A call behind its opening mark, up to and with the closing one; arguments as they come.

    What is no call is said as it stands, marks and all.
    """
    header = yield from source.match(_HEADER, closing)
    name = None if header is None else _text(header[1])
    if name is None:
        text, mark = yield from source.all_until(closing)
        yield from whole_call(text) or [Said(opening + (header[0] if header else "") + text + mark)]
        return
    yield CallBegun(name)
    yield from each_as(CallArguments, source.json_value())
    yield from source.all_until(closing)


def listed(source: Source, opening: str) -> Parts:
    """Calls in a list, whose bracket is the next character; those after the first as they come, too."""
    source.take(1)
    while True:
        header = yield from source.match(_HEADER, "]")
        name = None if header is None else _text(header[1])
        if name is None:
            text, _ = yield from source.all_until()
            yield from _whole_list(opening, "[" + (header[0] if header else "") + text)
            return
        yield CallBegun(name)
        yield from each_as(CallArguments, source.json_value())
        yield from source.all_until("}")  # with an id, maybe
        following = yield from source.spaces()
        source.take(1)
        if following != ",":
            return


def _whole_list(opening: str, text: str) -> Generator[Part, None, None]:
    """A list whose calls are written in another order, or what is no list of calls."""
    try:
        calls = json.loads(text)
    except ValueError:
        calls = None
    found = [call_parts(call) for call in calls] if isinstance(calls, list) else []
    if not found or None in found:
        yield Said(opening + text)
        return
    for parts in found:
        yield from parts or ()


def whole_call(text: str) -> list[Part] | None:
    """The call that a text is, whatever the order of its fields; None for what is none."""
    try:
        return call_parts(json.loads(text))
    except ValueError:
        return None


def call_parts(call: Any) -> list[Part] | None:
    """The call that an object is."""
    if not isinstance(call, dict):
        return None
    call = call["function"] if isinstance(call.get("function"), dict) else call
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(call.get("name"), str):
        return None
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    identity = call.get("id")
    return [CallBegun(call["name"], identity if isinstance(identity, str) else None), CallArguments(written)]


def _text(literal: str) -> str | None:
    try:
        return json.loads(literal)
    except ValueError:
        return None
