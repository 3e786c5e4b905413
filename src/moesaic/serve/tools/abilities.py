"""What a chat template can do with tools, found out by trying."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moesaic.errors import GenerationError
from moesaic.serve.tools.parts import Tool

Message = Mapping[str, Any]

_NAME, _KEY, _VALUE = "find_the_needle", "haystack", "barn"
_USER = {"role": "user", "content": "Find it."}


class Abilities(NamedTuple):
    """describes_tools: it writes the tools into the prompt. writes_calls: it writes calls of messages, whose arguments
    must be texts of JSON (arguments_as_text) and whose content must not be empty but none (no_content), or not.
    """

    describes_tools: bool
    writes_calls: bool
    arguments_as_text: bool = False
    no_content: bool = False

    def fitted(self, messages: Sequence[Message]) -> list[Message]:
        """Messages as the template wants them."""
        return [self._fitted(message) if message.get("tool_calls") else message for message in messages]

    def _fitted(self, message: Message) -> Message:
        calls = message["tool_calls"]
        if self.arguments_as_text:
            calls = [_with_text(call) for call in calls]
        content = message.get("content") or (None if self.no_content else "")
        return {**message, "content": content, "tool_calls": calls}


def abilities_of(render: Callable[[Sequence[Message], Sequence[Tool]], str]) -> Abilities:
    """Of the template that `render` renders messages and tools with."""

    def rendered(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        try:
            return render(messages, tools)
        except GenerationError:
            return ""

    tool = Tool(_NAME, "", {"type": "object", "properties": {_KEY: {"type": "string"}}})
    describes = _NAME in rendered([_USER], [tool])
    for as_text in (False, True):
        for no_content in (False, True):
            able = Abilities(describes, True, as_text, no_content)
            text = rendered(able.fitted(_CALLED))
            if _NAME in text and _VALUE in text and f"'{_VALUE}'" not in text:  # that would be Python, not JSON
                return able
    return Abilities(describes, False)


_ARGUMENTS = {_KEY: _VALUE}
_CALL = {"id": "123456789", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
_CALLED = [
    _USER,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "123456789", "name": _NAME, "content": "found"},
]


def _with_text(call: Message) -> Message:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
