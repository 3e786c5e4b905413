"""POST /v1/responses, and those that are kept."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse

from moesaic.serve.http import sse
from moesaic.serve.http.access import ServedModels, Settings
from moesaic.serve.http.answering import Answering, without_end
from moesaic.serve.http.bodies import BodyRoute
from moesaic.serve.http.calls import call_of
from moesaic.serve.http.declared import ERRORS, answers
from moesaic.serve.http.logprobs import chat_logprobs
from moesaic.serve.http.response_call import ResponseCall, count_input, joined, response_call
from moesaic.serve.http.response_items import Fields, Items
from moesaic.serve.http.response_store import ResponseStore, Stored
from moesaic.serve.http.response_types import CountInputBody, Deleted, InputTokens, ResponseAnswer, ResponseBody
from moesaic.serve.http.running import From, check_ended_well, start, unless_gone
from moesaic.serve.http.usage import Used
from moesaic.serve.request import Finished, Progress

router = APIRouter(route_class=BodyRoute)


def _responses(http: HttpRequest) -> ResponseStore:
    return http.app.state.responses


def _owner(http: HttpRequest) -> str | None:
    """The name of the key that a request brought, where there are keys."""
    return http.scope.get("state", {}).get("key_name")


Responses = Annotated[ResponseStore, Depends(_responses)]
Owner = Annotated[str | None, Depends(_owner)]


@router.post("/v1/responses", response_model=None, responses=answers(ResponseAnswer))
async def respond(
    body: ResponseBody, http: HttpRequest, models: ServedModels, settings: Settings, store: Responses, owner: Owner
) -> Response:
    """Answer an input, or go on from an earlier response."""
    before = store.before(body.previous_response_id, owner)
    call = await asyncio.to_thread(response_call, body, before, models.find(body.model), settings)
    events = _events(call, await start(call.served.desk, [call.request]), store, owner)
    if body.stream:
        return sse.stream(http.url.path, _numbered(events))
    return JSONResponse(await unless_gone(http, _last_response(events)))


@router.post("/v1/responses/input_tokens", response_model=InputTokens, responses=ERRORS)
async def count_tokens(
    body: CountInputBody, models: ServedModels, settings: Settings, store: Responses, owner: Owner
) -> Fields:
    """The tokens that a prompt would have."""
    before = store.before(body.previous_response_id, owner)
    count = await asyncio.to_thread(count_input, body, before, models.find(body.model), settings)
    return {"object": "response.input_tokens", "input_tokens": count}


@router.get("/v1/responses/{response_id}", response_model=ResponseAnswer, responses=ERRORS)
async def retrieve(response_id: str, store: Responses, owner: Owner) -> JSONResponse:
    """A response that is kept."""
    return JSONResponse(dict(store.find(response_id, owner).response))


@router.delete("/v1/responses/{response_id}", response_model=Deleted, responses=ERRORS)
async def delete(response_id: str, store: Responses, owner: Owner) -> Fields:
    """Forget a response."""
    store.forget(response_id, owner)
    return {"id": response_id, "object": "response", "deleted": True}


async def _numbered(events: AsyncGenerator[Fields, None]) -> AsyncGenerator[bytes, None]:
    numbers = itertools.count()
    try:
        async for event in events:
            yield sse.named({**event, "sequence_number": next(numbers)})
    finally:
        await events.aclose()


async def _last_response(events: AsyncGenerator[Fields, None]) -> Fields:
    last: Fields = {}
    try:
        async for event in events:
            last = event
    finally:
        await events.aclose()
    return last["response"]


async def _events(
    call: ResponseCall, events: AsyncGenerator[From, None], store: ResponseStore, owner: str | None
) -> AsyncGenerator[Fields, None]:
    """The last one has the whole response, which is then kept."""
    yield {"type": "response.created", "response": call.head}
    yield {"type": "response.in_progress", "response": call.head}
    answering, items, used = Answering(call.prepared, many=call.many), Items(), Used()
    try:
        async for _, event in events:
            if isinstance(event, Progress):
                used.add_experts([event.experts] if event.experts else [])
                for each in items.add(answering.progress(event), _logprobs(call, event)):
                    yield each
            elif isinstance(event, Finished):
                check_ended_well(event)
                used.add(0, event.usage)
                for each in [*items.add(answering.close()), *items.close(_status(event))]:
                    yield each
                used.reasoning_tokens = answering.reasoning_tokens
                response = _ended(call, items, used, event)
                _keep(call, response, store, owner)
                yield {"type": f"response.{response['status']}", "response": response}
    finally:
        await events.aclose()


def _logprobs(call: ResponseCall, event: Progress) -> list[Fields]:
    if call.request.top_logprobs is None:
        return []
    return chat_logprobs(without_end(event.tokens, call.request.eos_token_ids), call.served.token_texts)


def _status(finished: Finished) -> str:
    return "completed" if finished.reason == "stop" else "incomplete"


def _ended(call: ResponseCall, items: Items, used: Used, finished: Finished) -> Fields:
    status = _status(finished)
    details = {"reason": "max_output_tokens"} if status == "incomplete" else None
    usage = _usage(used.to_dict())
    return {**call.head, "status": status, "incomplete_details": details, "output": items.output, "usage": usage}


def _usage(usage: Mapping[str, Any]) -> Fields:
    """By this protocol's names."""
    found = {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
        "total_tokens": usage["total_tokens"],
    }
    return found | {key: value for key, value in usage.items() if key == "expert_activation"}


def _keep(call: ResponseCall, response: Fields, store: ResponseStore, owner: str | None) -> None:
    if call.body.store is not False:
        said = joined([_message(item) for item in response["output"]])
        store.keep(Stored(response, [*call.messages, *said], owner))


def _message(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """An item of an answer as the next turn's prompt has it."""
    if item["type"] == "function_call":
        call = call_of(item["call_id"], item["name"], item["arguments"])
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    text = "".join(part["text"] for part in item["content"])
    if item["type"] == "reasoning":
        return {"role": "assistant", "content": "", "reasoning_content": text, "thinking": text}
    return {"role": "assistant", "content": text}
