"""Calls whose arguments stand each between marks of its own: Qwen3-Coder's, MiniMax's, DeepSeek's and GLM's."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moesaic.serve.tools.parts import CallArguments, CallBegun, Parts, Said, Tool
from moesaic.serve.tools.source import Source, each_as


class Style(NamedTuple):
    """opening, closing: around calls. call, argument: patterns of what stands before them, with a group `name`, and
    in an argument's maybe `string`, which says whether its value is a text. trims: a line break around values."""

    opening: str
    closing: str
    call: re.Pattern[str]
    call_end: str
    argument: re.Pattern[str]
    argument_end: str
    trims: bool = False


QWEN3_CODER = Style(
    "<tool_call>",
    "</tool_call>",
    re.compile(r"\s*<function=(?P<name>[^>]+)>"),
    "</function>",
    re.compile(r"\s*<parameter=(?P<name>[^>]+)>"),
    "</parameter>",
    trims=True,
)
MINIMAX = Style(
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    re.compile(r'\s*<invoke name="(?P<name>[^"]+)">'),
    "</invoke>",
    re.compile(r'\s*<parameter name="(?P<name>[^"]+)">'),
    "</parameter>",
)
GLM = Style(
    "<tool_call>",
    "</tool_call>",
    re.compile(r"\s*(?P<name>[^\s<]+)\s*(?=<)"),
    "</tool_call>",
    re.compile(r"\s*<arg_key>(?P<name>[^<]+)</arg_key>\s*<arg_value>"),
    "</arg_value>",
)


def dsml(block: str) -> Style:
    """DeepSeek's from V3.2 on, with the name of the block around calls."""
    return Style(
        f"<｜DSML｜{block}>",
        f"</｜DSML｜{block}>",
        re.compile(r'\s*<｜DSML｜invoke name="(?P<name>[^"]+)">'),
        "</｜DSML｜invoke>",
        re.compile(r'\s*<｜DSML｜parameter name="(?P<name>[^"]+)"(?: string="(?P<string>true|false)")?>'),
        "</｜DSML｜parameter>",
    )


def parse(source: Source, tools: Sequence[Tool], style: Style) -> Parts:
    """Words, and calls between marks. Values get the types that the tool's schema asks for."""
    schemas = {tool.name: tool.parameters for tool in tools}
    while True:
        mark = yield from each_as(Said, source.until(style.opening))
        if not mark:
            return
        yield from _calls(source, style, schemas)


def _calls(source: Source, style: Style, schemas: Mapping[str, Mapping[str, Any]]) -> Parts:
    """Up to and with the mark at their end."""
    begun = False
    while True:
        header = yield from source.match(style.call, style.closing)
        if header is None:
            break
        begun = True
        yield CallBegun(header["name"].strip())
        yield from _arguments(source, style, schemas.get(header["name"].strip(), {}))
        if style.call_end == style.closing:
            return
    text, mark = yield from source.all_until(style.closing)
    if not begun:
        yield Said(style.opening + text + mark)


def _arguments(source: Source, style: Style, schema: Mapping[str, Any]) -> Parts:
    """One after another, as members of an object."""
    separator = "{"
    while True:
        header = yield from source.match(style.argument, style.call_end)
        if header is None:
            break
        value, _ = yield from source.all_until(style.argument_end)
        if style.trims:
            value = value.removeprefix("\n").removesuffix("\n")
        name = header["name"].strip()
        typed = _typed(value, _is_text(header.groupdict().get("string"), name, schema))
        yield CallArguments(f"{separator}{json.dumps(name, ensure_ascii=False)}: {typed}")
        separator = ", "
    yield from source.all_until(style.call_end)
    yield CallArguments("{}" if separator == "{" else "}")


def _is_text(said: str | None, name: str, schema: Mapping[str, Any]) -> bool:
    if said is not None:
        return said == "true"
    properties = schema.get("properties")
    wanted = properties.get(name) if isinstance(properties, dict) else None
    return isinstance(wanted, dict) and wanted.get("type") == "string"


def _typed(value: str, is_text: bool) -> str:
    """A value as JSON; one that is no JSON is a text, whatever the schema says."""
    if not is_text:
        try:
            return json.dumps(json.loads(value), ensure_ascii=False)
        except ValueError:
            pass
    return json.dumps(value, ensure_ascii=False)
