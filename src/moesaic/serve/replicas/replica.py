"""One replica: the whole application in a process of its own, asked by way of Ray instead of a socket."""

import importlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI

from moesaic.serve.replicas.asgi import Message, ask


class Replica:
    """Runs an application. Ray Serve makes it, checks it, and starts another in its place when it dies.

    maker: "module:function" that makes a FastAPI application of `options`: a name, so that a replica on another machine
    uses the package that is installed there.
    """

    async def __init__(self, maker: str, options: Mapping[str, Any]) -> None:
        module, _, function = maker.partition(":")
        self.app: FastAPI = getattr(importlib.import_module(module), function)(**options)
        self._life = self.app.router.lifespan_context(self.app)
        await self._life.__aenter__()

    async def stream(self, scope: Message, body: bytes, prefix: Sequence[bytes]) -> AsyncIterator[list[Message]]:
        """The answer to one request as its messages come. prefix: what it was sent here by."""
        async for messages in ask(self.app, scope, body):
            yield messages

    async def whole(self, scope: Message) -> tuple[int, bytes]:
        """The answer to a request without a body: its status and its body."""
        messages = [message async for some in ask(self.app, scope, b"") for message in some]
        return messages[0]["status"], b"".join(message.get("body", b"") for message in messages)

    async def __del__(self) -> None:
        await self._life.__aexit__(None, None, None)
