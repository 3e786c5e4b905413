"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's protocol."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse

from moesaic.serve.http import sse
from moesaic.serve.http.access import ServedModels, Settings
from moesaic.serve.http.answering import Answering
from moesaic.serve.http.bodies import BodyRoute
from moesaic.serve.http.declared import ANTHROPIC_ERRORS, answers
from moesaic.serve.http.message_call import MessageCall, message_call, prepare
from moesaic.serve.http.message_types import CountAnswer, CountBody, MessageAnswer, MessagesBody
from moesaic.serve.http.running import From, Outcome, check_ended_well, run_all, start
from moesaic.serve.http.usage import activation
from moesaic.serve.request import Finished, Progress, Usage
from moesaic.serve.tools.parts import CallBegun, Part, Said, Thought

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/messages", response_model=None, responses=answers(MessageAnswer, ANTHROPIC_ERRORS))
async def create(body: MessagesBody, http: HttpRequest, models: ServedModels, settings: Settings) -> Response:
    """Answer a conversation."""
    call = await asyncio.to_thread(message_call, body, models.find(body.model), settings)
    if body.stream:
        events = await start(call.served.desk, [call.request])
        return sse.stream(http.url.path, _events(call, events))
    outcomes = await run_all(http, call.served.desk, [call.request])
    return JSONResponse(_answer(call, outcomes[0]))


@router.post("/v1/messages/count_tokens", response_model=CountAnswer, responses=ANTHROPIC_ERRORS)
def count(body: CountBody, models: ServedModels, settings: Settings) -> dict[str, int]:
    """The tokens that a prompt would have. In a thread of its own, as long texts take a while."""
    return {"input_tokens": len(prepare(body, models.find(body.model), settings).prompt_ids)}


def _answer(call: MessageCall, outcome: Outcome) -> dict[str, Any]:
    answering = Answering(call.prepared, many=call.many)
    parts = [part for event in outcome.progress for part in answering.progress(event)] + answering.close()
    blocks = [_with_input(block) for block in _blocks(parts)]
    usage = _usage(outcome.finished.usage)
    if outcome.experts:
        usage["expert_activation"] = activation(outcome.experts)
    return {**call.head, "content": blocks, **_reasons(call, outcome.finished, answering), "usage": usage}


def _blocks(parts: list[Part]) -> Iterator[dict[str, Any]]:
    """Neighbouring parts of one kind as one block."""
    block: dict[str, Any] | None = None
    for part in parts:
        if block is None or _begins(block, part):
            if block is not None:
                yield block
            block = _new_block(part)
        key, text = _more(part)
        if key:
            block[key] += text
    if block is not None:
        yield block


def _begins(block: dict[str, Any], part: Part) -> bool:
    """Whether a part is the first of another block."""
    return isinstance(part, CallBegun) or block["type"] != _kind(part)


def _kind(part: Part) -> str:
    return "text" if isinstance(part, Said) else "thinking" if isinstance(part, Thought) else "tool_use"


def _new_block(part: Part) -> dict[str, Any]:
    if isinstance(part, Said):
        return {"type": "text", "text": ""}
    if isinstance(part, Thought):
        return {"type": "thinking", "thinking": "", "signature": ""}
    assert isinstance(part, CallBegun), "arguments without a call"
    return {"type": "tool_use", "id": part.id, "name": part.name, "input": ""}


def _more(part: Part) -> tuple[str, str]:
    """The field of its block that a part adds to, and what; nothing for the beginning of a call."""
    if isinstance(part, CallBegun):
        return "", ""
    return {"text": "text", "thinking": "thinking", "tool_use": "input"}[_kind(part)], part.text


def _with_input(block: dict[str, Any]) -> dict[str, Any]:
    """Arguments as an object; those that were cut short are none, and stop_reason says why."""
    if block["type"] != "tool_use":
        return block
    try:
        value = json.loads(block["input"] or "{}")
    except ValueError:
        value = {}
    return {**block, "input": value if isinstance(value, dict) else {}}


def _reasons(call: MessageCall, finished: Finished, answering: Answering) -> dict[str, Any]:
    if finished.reason != "stop":
        size = finished.usage.prompt_tokens + finished.usage.completion_tokens
        is_full = size >= call.served.max_length and finished.usage.completion_tokens < call.body.max_tokens
        return {"stop_reason": "model_context_window_exceeded" if is_full else "max_tokens", "stop_sequence": None}
    if isinstance(finished.stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": finished.stop}
    return {"stop_reason": "tool_use" if answering.calls else "end_turn", "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
    }


async def _events(call: MessageCall, events: AsyncGenerator[From, None]) -> AsyncGenerator[bytes, None]:
    nothing_yet = _usage(Usage(len(call.request.prompt_ids), 0))
    begun = {**call.head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": nothing_yet}
    yield sse.named({"type": "message_start", "message": begun})
    yield sse.named({"type": "ping"})
    answering, blocks, experts = Answering(call.prepared, many=call.many), _BlockEvents(), []
    async for _, event in events:
        if isinstance(event, Progress):
            experts += [event.experts] if event.experts else []
            for chunk in blocks.of(answering.progress(event)):
                yield chunk
        elif isinstance(event, Finished):
            check_ended_well(event)
            for chunk in [*blocks.of(answering.close()), *blocks.stop()]:
                yield chunk
            usage = _usage(event.usage) | ({"expert_activation": activation(experts)} if experts else {})
            yield sse.named({"type": "message_delta", "delta": _reasons(call, event, answering), "usage": usage})
    yield sse.named({"type": "message_stop"})


class _BlockEvents:
    """Events of content blocks: each begins, grows and stops."""

    def __init__(self) -> None:
        self._index = -1
        self._block: dict[str, Any] | None = None

    def of(self, parts: list[Part]) -> Iterator[bytes]:
        """The events that these parts of an answer cause."""
        for part in parts:
            if self._block is None or _begins(self._block, part):
                yield from self.stop()
                self._index += 1
                self._block = _new_block(part)
                shown = self._block | ({"input": {}} if "input" in self._block else {})
                yield self._event("content_block_start", content_block=shown)
            key, text = _more(part)
            if key == "input":
                yield self._event("content_block_delta", delta={"type": "input_json_delta", "partial_json": text})
            elif key:
                yield self._event("content_block_delta", delta={"type": f"{key}_delta", key: text})

    def stop(self) -> Iterator[bytes]:
        """The end of the block that is open, if one is."""
        block, self._block = self._block, None
        if block is not None:
            yield self._event("content_block_stop")

    def _event(self, kind: str, **more: Any) -> bytes:
        return sse.named({"type": kind, "index": self._index, **more})
