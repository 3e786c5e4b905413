"""Tools for templates that know none: described in the system message, calls and results as text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.serve.tools.formats import Format
from moesaic.serve.tools.parts import Tool
from moesaic.serve.tools.spelling import Maybe, Piece

Message = Mapping[str, Any]


def with_tools_described(messages: Sequence[Message], tools: Sequence[Tool], form: Format) -> list[Message]:
    """The system message, or a new one, says what may be called and how."""
    lines = "\n".join(json.dumps(tool.to_dict()["function"], ensure_ascii=False) for tool in tools)
    said = f"# Tools\n\nYou may call these functions:\n{lines}\n\nTo call one, write:\n{_example(form, tools[0])}"
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{said}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": said}, *messages]


def with_calls_as_text(messages: Sequence[Message], form: Format) -> list[Message]:
    """Calls as the assistant's words, results as the user's."""
    return [_as_text(message, form) for message in messages]


def _as_text(message: Message, form: Format) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = form.between.join(_written(form, call["function"]) for call in message["tool_calls"])
    words = message.get("content")
    return {
        "role": message["role"],
        "content": f"{words}\n" * bool(words) + form.opening + calls + form.closing,
    }


def _example(form: Format, tool: Tool) -> str:
    return form.opening + _spelled(form.spelled(tool), "{...}") + form.closing


def _written(form: Format, function: Mapping[str, Any]) -> str:
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return _spelled(form.spelled(Tool(function["name"], "", {})), arguments)


def _spelled(pieces: Sequence[Piece], arguments: str) -> str:
    """A call with its arguments where these stand as JSON."""
    return "".join(_piece(piece, arguments) for piece in pieces)


def _piece(piece: Piece, arguments: str) -> str:
    if isinstance(piece, Maybe):
        return _spelled(piece.pieces, arguments)
    return piece if isinstance(piece, str) else arguments
