"""POST /v1/completions: texts gone on with, and texts scored."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse

from moesaic.serve.http import sse
from moesaic.serve.http.access import ServedModels, Settings
from moesaic.serve.http.bodies import BodyRoute
from moesaic.serve.http.completion_call import Call, call_of
from moesaic.serve.http.completion_types import CompletionAnswer, CompletionBody
from moesaic.serve.http.declared import answers
from moesaic.serve.http.logprobs import completion_logprobs, prompt_logprobs
from moesaic.serve.http.prompts import Prompt
from moesaic.serve.http.running import From, Outcome, check_ended_well, run_all, start
from moesaic.serve.http.token_experts import token_experts
from moesaic.serve.http.usage import Used
from moesaic.serve.request import Finished, Progress, PromptScored, TokenInfo

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/completions", response_model=None, responses=answers(CompletionAnswer))
async def complete(body: CompletionBody, http: HttpRequest, models: ServedModels, settings: Settings) -> Response:
    """Go on with one or many prompts."""
    call = call_of(body, models.find(body.model), settings)
    if body.stream:
        events = await start(call.served.desk, call.requests)
        return sse.stream(http.url.path, _chunks(call, events))
    outcomes = await run_all(http, call.served.desk, call.requests)
    return JSONResponse(_answer(call, outcomes))


def _answer(call: Call, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    choices = []
    for number, prompt in enumerate(call.prompts):
        written = outcomes[number * call.runs : (number + 1) * call.runs]
        choices += [_choice(call, prompt, outcome, len(choices) + i) for i, outcome in enumerate(_best(call, written))]
    return {**call.head, "choices": choices, "usage": Used.of(outcomes, call.runs).to_dict()}


def _best(call: Call, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """The `n` likeliest per token of `best_of`."""
    if call.runs == call.choices:
        return outcomes
    return sorted(outcomes, key=_mean_logprob, reverse=True)[: call.choices]


def _mean_logprob(outcome: Outcome) -> float:
    logprobs = [info.logprob or 0.0 for info in outcome.tokens]
    return sum(logprobs) / max(1, len(logprobs))


def _choice(call: Call, prompt: Prompt, outcome: Outcome, index: int) -> dict[str, Any]:
    echoed = prompt.text if call.body.echo else ""
    found: dict[str, Any] = {
        "index": index,
        "text": echoed + outcome.text,
        "logprobs": None,
        **_reasons(outcome.finished),
    }
    if call.body.logprobs is not None:
        tokens = [*(outcome.prompt if call.body.echo else ()), *outcome.tokens]
        offset = 0 if call.body.echo else len(prompt.text)
        found["logprobs"] = completion_logprobs(tokens, call.served.token_texts, offset)
    if call.body.prompt_logprobs is not None:
        found["prompt_logprobs"] = prompt_logprobs(outcome.prompt, call.served.token_texts)
    return found


def _reasons(finished: Finished) -> dict[str, Any]:
    return {"finish_reason": "stop" if finished.reason == "stop" else "length", "stop_reason": finished.stop}


async def _chunks(call: Call, events: AsyncGenerator[From, None]) -> AsyncGenerator[bytes, None]:
    used = Used(call.runs)
    streams = [_Stream(call, call.prompts[index // call.runs], index) for index in range(len(call.requests))]
    for each in streams:
        if call.body.echo and call.body.logprobs is None:
            yield each.chunk(each.prompt.text)
    async for index, event in events:
        if isinstance(event, PromptScored):
            yield streams[index].scored(event)
        elif isinstance(event, Finished):
            check_ended_well(event)
            used.add(index, event.usage)
            yield streams[index].chunk("", **_reasons(event))
        elif isinstance(event, Progress):
            used.add_experts([event.experts] if event.experts else [])
            yield streams[index].progress(event)
    if call.body.wants_usage:
        yield sse.data({**call.head, "choices": [], "usage": used.to_dict()})
    yield sse.DONE


class _Stream:
    """One choice of a streamed answer."""

    def __init__(self, call: Call, prompt: Prompt, index: int) -> None:
        self.call, self.prompt, self.index = call, prompt, index
        self._offset = 0 if call.body.echo else len(prompt.text)
        self._plain = sse.Template(self._chunk(sse.Template.hole))

    def chunk(self, text: str, logprobs: Any = None, **more: Any) -> bytes:
        return sse.data(self._chunk(text, logprobs, **more))

    def _chunk(self, text: str, logprobs: Any = None, **more: Any) -> dict[str, Any]:
        choice = {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": None, **more}
        return {**self.call.head, "choices": [choice]}

    def scored(self, event: PromptScored) -> bytes:
        """The prompt: its text where it is to be echoed, its log probabilities where these were asked for."""
        body, more = self.call.body, {}
        if body.prompt_logprobs is not None:
            more["prompt_logprobs"] = prompt_logprobs(event.tokens, self.call.served.token_texts)
        if not body.echo or body.logprobs is None:
            return self.chunk("", **more)
        return self.chunk(self.prompt.text, self._logprobs(event.tokens), **more)

    def progress(self, event: Progress) -> bytes:
        if self.call.body.logprobs is None and event.experts is None:
            return self._plain.of(event.text)
        logprobs = None if self.call.body.logprobs is None else self._logprobs(event.tokens)
        ends = self.call.requests[self.index].eos_token_ids
        return self.chunk(event.text, logprobs, **token_experts(event, self.call.served.token_texts, ends))

    def _logprobs(self, tokens: Sequence[TokenInfo]) -> dict[str, list[Any]]:
        texts, offset = self.call.served.token_texts, self._offset
        self._offset += sum(len(texts.bytes_of(info.token_id).decode(errors="ignore")) for info in tokens)
        return completion_logprobs(tokens, texts, offset)
