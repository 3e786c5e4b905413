"""The items of a response, and the events that tell how they grow."""

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from moesaic.serve.tools.parts import CallArguments, CallBegun, Part, Said, Thought

Fields = dict[str, Any]


class Items:
    """Turns parts into items. Events lack their numbers; a reader that wants only the items lets them go by."""

    def __init__(self) -> None:
        self.output: list[Fields] = []
        self._open: Fields | None = None
        self._text = ""
        self._logprobs: list[Fields] = []

    def add(self, parts: Sequence[Part], logprobs: Sequence[Fields] = ()) -> Iterator[Fields]:
        """logprobs: of the tokens that these parts are made of; they go with words only."""
        for part in parts:
            if self._open is None or isinstance(part, CallBegun) or self._open["type"] != _kind(part):
                yield from self.close()
                yield from self._begin(part)
            if not isinstance(part, CallBegun):
                said = list(logprobs) if isinstance(part, Said) else []
                logprobs = [] if said else logprobs
                self._text += part.text
                self._logprobs += said
                yield self._delta(part, said)

    def close(self, status: str = "completed") -> Iterator[Fields]:
        """End the item that is open, if one is."""
        item, self._open = self._open, None
        if item is None:
            return
        text, self._text = self._text, ""
        logprobs, self._logprobs = self._logprobs, []
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self._event("function_call_arguments.done", item, arguments=text, name=item["name"])
        else:
            part = _content(item["type"], text, logprobs)
            item["content"] = [part]
            more = {"logprobs": logprobs} if item["type"] == "message" else {}
            yield self._event(f"{part['type']}.done", item, content_index=0, text=text, **more)
            yield self._event("content_part.done", item, content_index=0, part=part)
        yield {"type": "response.output_item.done", "output_index": len(self.output) - 1, "item": item}

    def _begin(self, part: Part) -> Iterator[Fields]:
        item = self._open = _new_item(part)
        self.output.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self.output) - 1, "item": dict(item)}
        if item["type"] != "function_call":
            yield self._event("content_part.added", item, content_index=0, part=_content(item["type"], "", []))

    def _delta(self, part: Said | Thought | CallArguments, logprobs: list[Fields]) -> Fields:
        assert self._open is not None
        if isinstance(part, CallArguments):
            return self._event("function_call_arguments.delta", self._open, delta=part.text)
        if isinstance(part, Thought):
            return self._event("reasoning_text.delta", self._open, content_index=0, delta=part.text)
        return self._event("output_text.delta", self._open, content_index=0, delta=part.text, logprobs=logprobs)

    def _event(self, kind: str, item: Fields, **more: Any) -> Fields:
        return {"type": f"response.{kind}", "item_id": item["id"], "output_index": len(self.output) - 1, **more}


def _kind(part: Part) -> str:
    return "message" if isinstance(part, Said) else "reasoning" if isinstance(part, Thought) else "function_call"


def _new_item(part: Part) -> Fields:
    begun = {"type": _kind(part), "status": "in_progress"}
    identity = uuid.uuid4().hex
    if isinstance(part, CallBegun):
        return {"id": f"fc_{identity}", **begun, "call_id": part.id, "name": part.name, "arguments": ""}
    if isinstance(part, Thought):
        return {"id": f"rs_{identity}", **begun, "summary": [], "content": []}
    return {"id": f"msg_{identity}", **begun, "role": "assistant", "content": []}


def _content(kind: str, text: str, logprobs: list[Fields]) -> Fields:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
