"""Requests at a desk on behalf of one HTTP request: their events as they come, or all that came of each.

A client that leaves takes its requests with it.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar

import numpy as np
from fastapi import Request as HttpRequest

from moesaic.serve.http.errors import ApiError
from moesaic.serve.request import Event, Finished, Pooled, Progress, PromptScored, Request, TokenInfo
from moesaic.serve.served import Runs

T = TypeVar("T")

# Streams wait this long for their first event before their status goes out, so that what the desk refuses is an error
# with a status of its own: at once, or when a grammar has been compiled.
FIRST_EVENT_S = 0.05
GRAMMAR_S = 6.0


class From(NamedTuple):
    """An event, and which of the requests it is of."""

    which: int
    event: Event


class Outcome:
    """All that came of a request."""

    def __init__(self) -> None:
        self.tokens: list[TokenInfo] = []
        self.progress: list[Progress] = []
        self.prompt: tuple[TokenInfo, ...] = ()
        self.vector_D: np.ndarray | None = None
        self._finished: Finished | None = None

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.progress)

    @property
    def experts(self) -> list[dict[int, np.ndarray]]:
        return [event.experts for event in self.progress if event.experts is not None]

    @property
    def finished(self) -> Finished:
        assert self._finished is not None, "the request has not ended"
        return self._finished

    def add(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.tokens += event.tokens
            self.progress.append(event)
        elif isinstance(event, PromptScored):
            self.prompt = event.tokens
        elif isinstance(event, Pooled):
            self.vector_D = event.vector_D
        else:
            self._finished = event


async def run_all(http: HttpRequest, desk: Runs, requests: Sequence[Request]) -> list[Outcome]:
    """What comes of each request. Raises ApiError for one that failed, and what the desk raises."""
    return await unless_gone(http, _run_all(desk, requests))


async def _run_all(desk: Runs, requests: Sequence[Request]) -> list[Outcome]:
    outcomes = [Outcome() for _ in requests]
    async with aclosing(events_of(desk, requests)) as events:
        async for index, event in events:
            outcomes[index].add(event)
            if isinstance(event, Finished):
                check_ended_well(event)
    return outcomes


def check_ended_well(finished: Finished) -> None:
    """Raises ApiError for a request that the server gave up."""
    if finished.reason == "error":
        raise ApiError(500, finished.error or "the request failed", code="internal_error")
    if finished.reason == "cancelled":
        raise ApiError(
            503, "the server is shutting down; try again", code="shutting_down", headers={"Retry-After": "5"}
        )


async def unless_gone(http: HttpRequest, work: Awaitable[T]) -> T:
    """What comes of the work, which is cancelled when the client leaves. The body must have been read."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client left")
        return working.result()
    finally:
        watching.cancel()
        if working.cancel():
            await asyncio.wait({working})


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def start(desk: Runs, requests: Sequence[Request]) -> AsyncGenerator[From, None]:
    """The events of several requests. Raises at once what the desk refuses: its status can then be an error's."""
    events: AsyncGenerator[Any, None] = desk.run(requests[0]) if len(requests) == 1 else events_of(desk, requests)
    first = asyncio.ensure_future(anext(events, None))
    compiles = any(request.grammar is not None for request in requests)
    try:
        await asyncio.wait({first}, timeout=GRAMMAR_S if compiles else FIRST_EVENT_S)
    except asyncio.CancelledError:
        first.cancel()
        raise
    if first.done() and (error := first.exception()) is not None:
        await events.aclose()
        raise error
    return _one_going_on(first, events) if len(requests) == 1 else _going_on(first, events)


async def _one_going_on(
    first: "asyncio.Future[Event | None]", events: AsyncGenerator[Event, None]
) -> AsyncGenerator[From, None]:
    """`_going_on` of a single request, a generator less on the way of each token."""
    try:
        event = await first
        if event is not None:
            yield From(0, event)
            async for event in events:
                yield From(0, event)
    finally:
        if first.cancel():
            await asyncio.wait({first})
        await events.aclose()


async def _going_on(
    first: "asyncio.Future[From | None]", events: AsyncGenerator[From, None]
) -> AsyncGenerator[From, None]:
    try:
        event = await first
        if event is not None:
            yield event
            async for event in events:
                yield event
    finally:
        if first.cancel():
            await asyncio.wait({first})
        await events.aclose()


async def events_of(desk: Runs, requests: Sequence[Request]) -> AsyncGenerator[From, None]:
    """The events of several requests as they come; leaving early cancels all."""
    if len(requests) == 1:
        async with aclosing(desk.run(requests[0])) as events:
            async for event in events:
                yield From(0, event)
        return
    queue: asyncio.Queue[From | Exception] = asyncio.Queue()
    pumps = [asyncio.ensure_future(_pump(desk, index, request, queue)) for index, request in enumerate(requests)]
    try:
        left = len(requests)
        while left:
            got = await queue.get()
            if isinstance(got, Exception):
                raise got
            left -= isinstance(got.event, Finished)
            yield got
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.wait(pumps)


async def _pump(desk: Runs, index: int, request: Request, queue: "asyncio.Queue[From | Exception]") -> None:
    try:
        async with aclosing(desk.run(request)) as events:
            async for event in events:
                queue.put_nowait(From(index, event))
    except Exception as error:  # handed on to the one who waits for all of them
        queue.put_nowait(error)
