"""Sees every HTTP request from its first byte to its last: gives it an id, then has it counted and logged."""

import time
from collections.abc import Callable
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.serve.operation.notes import Notes, current, request_id_of, route_of


class Exchange(NamedTuple):
    """A request that is over. status: 499 where the client left before an answer. key_name: whose key it brought."""

    method: str
    route: str
    status: int
    seconds: float
    notes: Notes
    key_name: str | None
    client: str | None


class Observe:
    """Tells `hear` of every request that is over. Answers carry its id as x-request-id."""

    def __init__(self, app: ASGIApp, hear: Callable[[Exchange], None]) -> None:
        self.app, self.hear = app, hear

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        notes = Notes(request_id_of(scope))
        scope.setdefault("state", {})["request_id"] = notes.request_id
        status, id_header = 499, (b"x-request-id", notes.request_id.encode())

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                others = [header for header in message.get("headers", ()) if header[0].lower() != id_header[0]]
                message = {**message, "headers": [*others, id_header]}
            await send(message)

        token = current.set(notes)
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            current.reset(token)
            seconds = time.perf_counter() - notes.started_at
            client = scope["client"][0] if scope.get("client") else None
            key_name = scope["state"].get("key_name")
            self.hear(Exchange(scope["method"], route_of(scope), status, seconds, notes, key_name, client))
