"""Between the loop's thread and asyncio: a request is handed in, and its events come out one after another."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

from moesaic.engine.engine import Engine
from moesaic.serve.choice.guidance import Guidance
from moesaic.serve.loop.loop import Loop
from moesaic.serve.loop.settings import LoopSettings
from moesaic.serve.request import Event, Finished, Heard, Request
from moesaic.serve.seen import Stats
from moesaic.serve.speculation.drafter import Drafter


class Desk:
    """Takes requests inside a running event loop. All events of a step cross into it together."""

    def __init__(
        self,
        engine: Engine,
        decode: Callable[[list[int]], str],
        *,
        settings: LoopSettings | None = None,
        drafter: Drafter | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        self._asyncio = asyncio.get_running_loop()
        self._waiting: dict[int, _Mailbox] = {}
        self.loop = Loop(engine, decode, self._hear, settings=settings, drafter=drafter, guidance=guidance)

    async def run(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of a request; leaving early cancels it. Raises GenerationError before the first."""
        if request.grammar is not None:
            await asyncio.to_thread(self.loop.prepare, request)
        number = self.loop.submit(request)
        events = self._waiting[number] = _Mailbox(self._asyncio)
        ended = False
        try:
            while not ended:
                event = await events.get()
                ended = isinstance(event, Finished)
                yield event
        finally:
            del self._waiting[number]
            if not ended:
                self.loop.cancel(number)

    def stats(self) -> Stats:
        """How the loop stands."""
        return self.loop.stats()

    async def close(self) -> None:
        """End all requests."""
        await asyncio.to_thread(self.loop.close)

    def _hear(self, heard: Sequence[Heard]) -> None:
        if heard and not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(self._hand_out, heard)

    def _hand_out(self, heard: Sequence[Heard]) -> None:
        for number, event in heard:
            if number in self._waiting:
                self._waiting[number].put(event)


class _Mailbox:
    """Events for one reader: what a queue of asyncio does for many takes three times as long."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[Event] = deque()
        self._awaited: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        self._events.append(event)
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)

    async def get(self) -> Event:
        if not self._events:
            self._awaited = self._loop.create_future()
            await self._awaited
            self._awaited = None
        return self._events.popleft()
