"""Clients that leave take their requests with them, and errors of the server are told without its insides."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import QueueFullError, ServerClosingError
from moesaic.serve.http.app import create_app
from moesaic.serve.request import Event, Finished, Progress, Request, TokenInfo, Usage
from moesaic.serve.seen import Stats
from moesaic.serve.served import Models, Served
from tests.serve import tiny

PATHS = {
    "/v1/completions": {"model": "m", "prompt": ["fox", "dog"], "max_tokens": 5},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "x"}], "n": 2},
    "/v1/responses": {"model": "m", "input": "x"},
    "/v1/messages": {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5},
}


class WaitingDesk:
    """Writes a token, and then nothing until it is left."""

    def __init__(self, then: Exception | Finished | None = None) -> None:
        self.then = then
        self.running = 0
        self.begun, self.left = asyncio.Event(), asyncio.Event()

    async def run(self, request: Request) -> AsyncGenerator[Event, None]:
        self.running += 1
        self.begun.set()
        try:
            yield Progress((TokenInfo(70),), "a")
            if isinstance(self.then, Exception):
                raise self.then
            if self.then is not None:
                yield self.then
                return
            await asyncio.Event().wait()
        finally:
            self.running -= 1
            if not self.running:
                self.left.set()

    def stats(self) -> Stats:
        raise NotImplementedError("nothing asks for them here")

    async def close(self) -> None:
        pass


def served(desk: WaitingDesk) -> Models:
    config = tiny.engine().config
    tokenizer = Tokenizer.load(tiny.folder())
    return Models([Served("m", tokenizer=tokenizer, config=config, max_length=512, open_desk=lambda: desk)])


class Leaving:
    """An ASGI client that sends a body, and disconnects when it is told to."""

    def __init__(self, path: str, body: bytes) -> None:
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "state": {},
        }
        self._body: bytes | None = body
        self.leaves = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        pass


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(path: str, stream: bool) -> None:
    async def leave() -> int:
        desk = WaitingDesk()
        models = served(desk)
        app = create_app(models)
        await models.start()
        client = Leaving(path, httpx.Request("POST", "http://x", json={**PATHS[path], "stream": stream}).content)
        serving = asyncio.ensure_future(app(client.scope, client.receive, client.send))
        await asyncio.wait_for(desk.begun.wait(), 30)
        client.leaves.set()
        await asyncio.wait_for(desk.left.wait(), 30)
        await asyncio.wait_for(serving, 30)
        return desk.running

    assert asyncio.run(leave()) == 0


async def ask(desk: WaitingDesk, path: str, *, stream: bool) -> httpx.Response:
    models = served(desk)
    await models.start()
    transport = httpx.ASGITransport(create_app(models), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.post(path, json={**PATHS[path], "stream": stream})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_told_without_its_insides(path: str, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        answer = asyncio.run(ask(WaitingDesk(RuntimeError("secret place")), path, stream=stream))
    assert answer.status_code == (200 if stream else 500)
    assert "the server failed; its log says how" in answer.text
    assert "secret" not in answer.text and "Traceback" not in answer.text
    assert "secret place" in caplog.text


class RefusingDesk(WaitingDesk):
    """Takes nothing."""

    async def run(self, request: Request) -> AsyncGenerator[Event, None]:
        assert isinstance(self.then, Exception)
        raise self.then
        yield  # which makes it a generator


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"), [(QueueFullError("full"), 429), (ServerClosingError("closing"), 503)], ids=["full", "closing"]
)
def test_what_the_desk_refuses(path: str, stream: bool, error: Exception, status: int) -> None:
    answer = asyncio.run(ask(RefusingDesk(error), path, stream=stream))
    assert answer.status_code == status and answer.headers["retry-after"]


@pytest.mark.parametrize("path", PATHS)
def test_a_server_that_shuts_down(path: str) -> None:
    ended = Finished("cancelled", Usage(1, 1))
    answer = asyncio.run(ask(WaitingDesk(ended), path, stream=False))
    assert answer.status_code == 503 and answer.headers["retry-after"]
    streamed = asyncio.run(ask(WaitingDesk(ended), path, stream=True))
    assert "shutting down" in streamed.text
