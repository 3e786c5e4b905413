"""Asks an ASGI application in this process, message by message."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def scope_of(path: str = "/v1/completions", method: str = "POST", headers: Sequence[tuple[str, str]] = ()) -> Scope:
    encoded = [(name.encode(), value.encode()) for name, value in headers]
    return {"type": "http", "path": path, "method": method, "headers": encoded, "client": ("10.0.0.1", 5)}


async def ask(app: ASGIApp, scope: Scope, parts: Sequence[bytes] = (b"",), *, then_wait: bool = False) -> Answer:
    """The answer to a body that comes in parts; then_wait: its end never comes."""
    left: list[Message] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if not then_wait:
        left[-1]["more_body"] = False
    sent: list[Message] = []

    async def receive() -> Message:
        if left:
            return left.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:]))


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body that it got."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
