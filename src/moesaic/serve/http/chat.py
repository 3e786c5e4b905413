"""POST /v1/chat/completions."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse

from moesaic.serve.http import sse
from moesaic.serve.http.access import ServedModels, Settings
from moesaic.serve.http.answering import Answering, Whole, without_end
from moesaic.serve.http.bodies import BodyRoute
from moesaic.serve.http.chat_call import ChatCall, chat_call
from moesaic.serve.http.chat_types import ChatAnswer, ChatBody
from moesaic.serve.http.declared import answers
from moesaic.serve.http.logprobs import chat_logprobs, prompt_logprobs
from moesaic.serve.http.running import From, Outcome, check_ended_well, run_all, start
from moesaic.serve.http.token_experts import token_experts
from moesaic.serve.http.usage import Used
from moesaic.serve.request import Finished, Progress, PromptScored, TokenInfo
from moesaic.serve.tools.parts import CallBegun, Part, Said, Thought

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/chat/completions", response_model=None, responses=answers(ChatAnswer))
async def chat(body: ChatBody, http: HttpRequest, models: ServedModels, settings: Settings) -> Response:
    """Answer a conversation."""
    call = await chat_call(body, models.find(body.model), settings)
    if body.stream:
        events = await start(call.served.desk, call.requests)
        return sse.stream(http.url.path, _chunks(call, events))
    outcomes = await run_all(http, call.served.desk, call.requests)
    return JSONResponse(_answer(call, outcomes))


def _answer(call: ChatCall, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    used = Used.of(outcomes, len(outcomes))
    choices = []
    for index, outcome in enumerate(outcomes):
        answering = Answering(call.prepared, many=call.many)
        whole = Whole([part for event in outcome.progress for part in answering.progress(event)] + answering.close())
        used.reasoning_tokens += answering.reasoning_tokens
        choices.append({"index": index, "message": _message(call, whole), **_rest(call, outcome, answering)})
    return {**call.head, "choices": choices, "usage": used.to_dict()}


def _message(call: ChatCall, whole: Whole) -> dict[str, Any]:
    found: dict[str, Any] = {"role": "assistant", "content": whole.said, "refusal": None}
    if whole.calls:
        found["content"] = whole.said or None
        found["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for call in whole.calls
        ]
    return {**found, **_thought(whole.thought if call.body.include_reasoning else "")}


def _thought(text: str) -> dict[str, str]:
    """Under both names by which clients know it."""
    return {"reasoning_content": text, "reasoning": text} if text else {}


def _rest(call: ChatCall, outcome: Outcome, answering: Answering) -> dict[str, Any]:
    found: dict[str, Any] = {"logprobs": _logprobs(call, outcome.tokens), **_reasons(outcome.finished, answering)}
    if call.body.prompt_logprobs is not None:
        found["prompt_logprobs"] = prompt_logprobs(outcome.prompt, call.served.token_texts)
    return found


def _reasons(finished: Finished, answering: Answering) -> dict[str, Any]:
    reason = "length" if finished.reason != "stop" else "tool_calls" if answering.calls else "stop"
    return {"finish_reason": reason, "stop_reason": finished.stop}


def _logprobs(call: ChatCall, tokens: Sequence[TokenInfo]) -> dict[str, Any] | None:
    if not call.body.logprobs:
        return None
    said = without_end(tokens, call.requests[0].eos_token_ids)
    return {"content": chat_logprobs(said, call.served.token_texts), "refusal": None}


async def _chunks(call: ChatCall, events: AsyncGenerator[From, None]) -> AsyncGenerator[bytes, None]:
    used = Used(len(call.requests))
    streams = [_Stream(call, index) for index in range(len(call.requests))]
    for stream in streams:
        yield stream.chunk({"role": "assistant", "content": ""})
    async for index, event in events:
        if isinstance(event, Finished):
            check_ended_well(event)
            used.add(index, event.usage)
            chunks = streams[index].finished(event)
        elif isinstance(event, Progress):
            used.add_experts([event.experts] if event.experts else [])
            chunks = streams[index].progress(event)
        elif isinstance(event, PromptScored):
            chunks = streams[index].scored(event)
        else:
            continue
        for chunk in chunks:
            yield chunk
    if call.body.wants_usage:
        used.reasoning_tokens = sum(stream.answering.reasoning_tokens for stream in streams)
        yield sse.data({**call.head, "choices": [], "usage": used.to_dict()})
    yield sse.DONE


class _Stream:
    """One choice of a streamed answer. Log probabilities wait for the next words that go out."""

    def __init__(self, call: ChatCall, index: int) -> None:
        self.call, self.index = call, index
        self.answering = Answering(call.prepared, many=call.many)
        self._waiting: list[TokenInfo] = []
        self._calls = 0
        self._plain = sse.Template(self._chunk({"content": sse.Template.hole}))

    def chunk(self, delta: dict[str, Any], **more: Any) -> bytes:
        return sse.data(self._chunk(delta, **more))

    def _chunk(self, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return {**self.call.head, "choices": [choice]}

    def scored(self, event: PromptScored) -> list[bytes]:
        if self.call.body.prompt_logprobs is None:
            return []
        return [self.chunk({}, prompt_logprobs=prompt_logprobs(event.tokens, self.call.served.token_texts))]

    def progress(self, event: Progress) -> list[bytes]:
        if self.call.body.logprobs:
            self._waiting += event.tokens
        chunks = [self._part(part) for part in self._told(self.answering.progress(event))]
        told = token_experts(event, self.call.served.token_texts, self.call.requests[0].eos_token_ids)
        return [*chunks, self.chunk({}, **told)] if told else chunks

    def finished(self, event: Finished) -> list[bytes]:
        chunks = [self._part(part) for part in self._told(self.answering.close())]
        return [*chunks, self.chunk({}, logprobs=self._take_logprobs(), **_reasons(event, self.answering))]

    def _told(self, parts: Sequence[Part]) -> list[Part]:
        return [part for part in parts if self.call.body.include_reasoning or not isinstance(part, Thought)]

    def _part(self, part: Part) -> bytes:
        if isinstance(part, Said) and not self._waiting:
            return self._plain.of(part.text)
        return self.chunk(self._delta(part), logprobs=self._take_logprobs())

    def _delta(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Said):
            return {"content": part.text}
        if isinstance(part, Thought):
            return _thought(part.text)
        if isinstance(part, CallBegun):
            self._calls += 1
            call = {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}
        else:
            call = {"function": {"arguments": part.text}}
        return {"tool_calls": [{"index": self._calls - 1, **call}]}

    def _take_logprobs(self) -> dict[str, Any] | None:
        tokens, self._waiting = self._waiting, []
        return _logprobs(self.call, tokens) if tokens else None
