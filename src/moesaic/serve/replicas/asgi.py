"""An ASGI application asked from inside Python: a request in, its messages out as they come."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


async def ask(app: App, scope: Message, body: bytes) -> AsyncIterator[list[Message]]:
    """The messages of one answer, those that are ready at a time together. Leaving early is the client's leaving."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    given, gone = False, asyncio.Event()

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(scope, receive, messages.put)
        finally:
            messages.put_nowait(None)

    task = asyncio.ensure_future(run())
    try:
        ended = False
        while not ended:
            ready = [await messages.get()]
            while not messages.empty():
                ready.append(messages.get_nowait())
            ended = ready[-1] is None
            if found := [message for message in ready if message is not None]:
                yield found
        await task  # raises what the application raised
    finally:
        gone.set()
        if not task.done():
            with suppress(asyncio.TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(task, timeout=5)
