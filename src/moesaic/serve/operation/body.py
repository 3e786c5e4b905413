"""What a client may take of the server: bytes and seconds of a request's body, seconds of an unread answer."""

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.serve.operation.refusals import refuse
from moesaic.serve.operation.settings import Limits

_LINGER_S = 2.0


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
        exchange = _Exchange(body, receive, send, self.limits.stall_s)
        await self.app(scope, exchange.receive, exchange.send)

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
        self._receive, self._send, self._stall_s = receive, send, stall_s
        self._stalled = asyncio.Event()

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
        try:
            async with asyncio.timeout(self._stall_s):
                await self._send(message)
        except TimeoutError:
            self._stalled.set()
            raise OSError("the client has stopped reading") from None


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
