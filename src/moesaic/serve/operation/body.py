"""What a client may take of the server: bytes and seconds of a request's body, seconds of an unread answer."""

import asyncio
import contextlib
import gc
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.engine.memory import give_back_freed
from moesaic.serve.http.sse import DIRECT
from moesaic.serve.operation.refusals import refuse
from moesaic.serve.operation.settings import Limits

_LINGER_S = 2.0
_LONG_BYTES = 1 << 18  # of a body: read, it takes ten times as much, and errors that say what is wrong hold all of it


class LimitBody:
    """Reads a body whole before its route runs: 413 for one that is too large, 408 for one that comes too slowly.

    A client that leaves its answer unread for `stall_s` counts as gone.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        too_large = f"a body of more than {self.limits.body_bytes} bytes; send less"
        if _stated_length(scope) > self.limits.body_bytes:
            return await _refuse_rest(scope, receive, send, 413, too_large)
        try:
            async with asyncio.timeout(self.limits.body_s):
                body = await self._read(receive)
        except TimeoutError:
            message = f"the body did not come within {self.limits.body_s:g} s"
            return await refuse(scope, send, 408, message, {"connection": "close"})
        if body is None:
            return
        if len(body) > self.limits.body_bytes:
            return await _refuse_rest(scope, receive, send, 413, too_large)
        exchange, is_long = _Exchange(body, receive, send, self.limits.stall_s), len(body) > _LONG_BYTES
        scope[DIRECT] = exchange.send
        del body
        try:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            if is_long:
                gc.collect()  # errors and their frames refer to each other
                give_back_freed()

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or a little more than is allowed of it; None when the client has left."""
        body = bytearray()
        while len(body) <= self.limits.body_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        return bytes(body)


class _Exchange:
    """Hands a body out again, and sends until the client stops reading."""

    def __init__(self, body: bytes, receive: Receive, send: Send, stall_s: float) -> None:
        self._body: bytes | None = body
        self._receive, self._send = receive, send
        self._stalled = asyncio.Event()
        self._patience = _Patience(stall_s, self._stalled.set)

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        leaving = asyncio.ensure_future(self._receive())
        stalling = asyncio.ensure_future(self._stalled.wait())
        try:
            await asyncio.wait((leaving, stalling), return_when=asyncio.FIRST_COMPLETED)
            return leaving.result() if leaving.done() else {"type": "http.disconnect"}
        finally:
            leaving.cancel()
            stalling.cancel()

    async def send(self, message: Message) -> None:
        """Raises OSError, as a lost connection does, when nothing could be sent for too long."""
        with self._patience:
            await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self._patience.end()


class _Patience:
    """A limit on the seconds of each of many short waits, one at a time: `with` raises OSError for one that is longer.

    One clock for all of them: tokens are many, and `asyncio.timeout` for each takes longer than sending it.
    """

    def __init__(self, seconds: float, lost: Callable[[], None]) -> None:
        self._seconds, self._lost = seconds, lost
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Task[Any] | None = None
        self._since = 0.0
        self._clock: asyncio.TimerHandle | None = None
        self._is_lost = False

    def __enter__(self) -> None:
        self._waiting, self._since = asyncio.current_task(), self._loop.time()
        if self._clock is None:
            self._clock = self._loop.call_later(self._seconds, self._look)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        waiting, self._waiting = self._waiting, None
        if self._is_lost and waiting is not None and not waiting.uncancel() and kind is asyncio.CancelledError:
            raise OSError("the client has stopped reading") from None

    def end(self) -> None:
        """There is nothing more to wait for."""
        if self._clock is not None:
            self._clock.cancel()

    def _look(self) -> None:
        """End a wait that is too long; else look again when it would be, or when there is one."""
        left = self._since + self._seconds - self._loop.time()
        self._clock = None
        if self._waiting is not None and left > 0:
            self._clock = self._loop.call_later(left, self._look)
        elif self._waiting is not None:
            self._is_lost = True
            self._lost()
            self._waiting.cancel()


async def _refuse_rest(scope: Scope, receive: Receive, send: Send, status: int, message: str) -> None:
    """Refuse a body of which more is to come, and take in the rest for a moment.

    A connection that is closed while its client still sends is reset, and the client never reads the answer.
    """

    async def send_unfinished(part: Message) -> None:
        await send({**part, "more_body": True} if part["type"] == "http.response.body" else part)

    await refuse(scope, send_unfinished, status, message, {"connection": "close"})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while (await receive()).get("more_body"):
                pass
    await send({"type": "http.response.body", "body": b""})


def _stated_length(scope: Scope) -> int:
    value = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return int(value) if value.isdigit() else 0
