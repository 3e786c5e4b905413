"""The end of a server: what runs may finish, nothing new begins."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from moesaic.serve.operation.refusals import refuse, retry_after

State = Literal["loading", "ready", "draining"]
_LAST_WORDS_S = 5.0
# The live load never ends by itself: nobody waits for it.
_ALWAYS = frozenset({"/health", "/ready", "/metrics", "/v1/routing/stream"})


class Readiness:
    """Whether new requests are taken, and how many are being answered."""

    def __init__(self) -> None:
        self.state: State = "loading"
        self.answering = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        self.answering += 1
        self._idle.clear()

    def leave(self) -> None:
        self.answering -= 1
        if not self.answering:
            self._idle.set()

    async def drain(self, seconds: float, end_all: Callable[[], Awaitable[None]]) -> int:
        """Take nothing new, and wait until nothing is answered any more. How many did not finish in time.

        After `seconds` `end_all` ends what still runs, with what it has by then.
        """
        self.state = "draining"
        if await self._idle_within(seconds):
            return 0
        unfinished = self.answering
        await end_all()
        await self._idle_within(_LAST_WORDS_S)
        return unfinished

    async def _idle_within(self, seconds: float) -> bool:
        if not self.answering:  # wait_for gives up at 0 s without a look
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True


class TakeNothingNew:
    """Answers 503 while the server loads or drains; counts what is being answered."""

    def __init__(self, app: ASGIApp, readiness: Readiness, retry_s: float = 10.0) -> None:
        self.app, self.readiness, self.retry_s = app, readiness, retry_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _ALWAYS:
            return await self.app(scope, receive, send)
        if self.readiness.state != "ready":
            message = f"the server is {self.readiness.state}; ask again"
            headers = {**retry_after(self.retry_s), "connection": "close"}
            return await refuse(scope, send, 503, message, headers)
        self.readiness.enter()
        try:
            await self.app(scope, receive, send)
        finally:
            self.readiness.leave()
