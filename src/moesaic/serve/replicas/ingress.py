"""What clients talk to: hands requests to replicas, again where one died before the first byte of its answer."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from moesaic.serve.replicas.asgi import Message
from moesaic.serve.replicas.prefixes import beginnings, prompt_of

_log = logging.getLogger(__name__)
_ASKED = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 1.0


class ReplicaLostError(Exception):
    """The replica that had a request is gone, or none could be found."""


class Replicas(Protocol):
    """Whoever answers."""

    def ask(self, scope: Message, body: bytes, prefix: Sequence[bytes]) -> AsyncIterator[list[Message]]:
        """The answer's messages. Raises ReplicaLostError, at any time."""
        ...


class Ingress:
    """An ASGI application in front of replicas.

    An answer begins once the replica has something to say: a replica that is lost before that has sent nothing, and the
    request goes to another, for up to patience_s. An answer that is lost later is broken off, and a stream of events
    says so first. max_body_bytes: of a request.
    """

    def __init__(self, replicas: Replicas, *, patience_s: float = 60.0, max_body_bytes: int = 32 << 20) -> None:
        self.replicas, self.patience_s, self.max_body_bytes = replicas, patience_s, max_body_bytes

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """Serve one request."""
        assert scope["type"] == "http", "lifespan and web sockets do not come this far"
        body = await _body(receive, self.max_body_bytes)
        if body is None:
            return await _refuse(send, 413, f"a body of more than {self.max_body_bytes:,} bytes; send less")
        answering = asyncio.ensure_future(self._answer(scope, body, send))
        leaving = asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not answering.done():
                answering.cancel()
        if not answering.cancelled() and answering.done():
            answering.result()

    async def _answer(self, scope: Message, body: bytes, send: Callable[[Message], Awaitable[None]]) -> None:
        asked = {name: scope[name] for name in _ASKED if name in scope}
        prefix = beginnings(prompt_of(body))
        clock, wait_s = asyncio.get_running_loop().time, _FIRST_WAIT_S
        give_up = clock() + self.patience_s
        while True:
            answer = _Answer(send)
            try:
                async with aclosing(self.replicas.ask(asked, body, prefix)) as messages:  # pyright: ignore[reportArgumentType]  generators all
                    async for some in messages:
                        await answer.take(some)
                return
            except ReplicaLostError as error:
                _log.warning("%s; %s", error, "the answer is broken off" if answer.begun else "asking another")
                if answer.begun:
                    return await answer.break_off()
                if clock() >= give_up:
                    return await _refuse(send, 503, "no replica answers; try again later", retry_after_s=5)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


class _Answer:
    """Hands on messages, but not the head of an answer before something of its body is there."""

    def __init__(self, send: Callable[[Message], Awaitable[None]]) -> None:
        self._send, self._head, self.begun = send, None, False
        self._streams_events = False

    async def take(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if message["type"] == "http.response.start":
                self._head = message
                self._streams_events = _content_type(message).startswith(b"text/event-stream")
                continue
            if self._head is not None and (message.get("body") or not message.get("more_body")):
                self.begun = True
                await self._send(self._head)
                self._head = None
            if self.begun:
                await self._send(message)

    async def break_off(self) -> None:
        """Say so where that can be said. Raises ConnectionAbortedError, so that nobody takes it for a whole answer."""
        if self._streams_events:
            event = f"data: {json.dumps(_error('the replica that wrote this answer is gone; ask again'))}\n\n"
            await self._send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        raise ConnectionAbortedError("a replica was lost in the middle of its answer")


async def _body(receive: Callable[[], Awaitable[Message]], most: int) -> bytes | None:
    """None: more than that."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


async def left(receive: Callable[[], Awaitable[Message]]) -> None:
    """Return once the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _content_type(head: Message) -> bytes:
    return next((value for name, value in head.get("headers", ()) if name.lower() == b"content-type"), b"")


def _error(message: str) -> dict[str, dict[str, str | None]]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": "replica_unavailable"}}


async def _refuse(
    send: Callable[[Message], Awaitable[None]], status: int, message: str, retry_after_s: int | None = None
) -> None:
    headers = [(b"content-type", b"application/json")]
    if retry_after_s is not None:
        headers.append((b"retry-after", str(retry_after_s).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(_error(message)).encode(), "more_body": False})
