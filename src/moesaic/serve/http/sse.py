"""Server-sent events."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from moesaic.serve.http.errors import as_api_error, error_body

DONE = b"data: [DONE]\n\n"
DIRECT = "moesaic.send"
"""Of a scope: sends parts of a body past the layers that only look at how an answer begins. Tokens are many."""
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold events back


def data(value: Mapping[str, Any]) -> bytes:
    """An event as OpenAI's protocol has it."""
    return b"data: " + to_json(value) + b"\n\n"


def named(value: Mapping[str, Any]) -> bytes:
    """An event under the name of its type, as Anthropic's protocol and OpenAI's responses have it."""
    return b"event: " + value["type"].encode() + b"\ndata: " + to_json(value) + b"\n\n"


class Template:
    """OpenAI's event that is the same each time but for one text in it, which is `hole` in the value."""

    hole = "\0text\0"

    def __init__(self, value: Mapping[str, Any]) -> None:
        self._before, _, self._after = data(value).partition(to_json(self.hole))

    def of(self, text: str) -> bytes:
        """The event with this text, the bytes that `data` gives."""
        return self._before + to_json(text) + self._after


def stream(path: str, events: AsyncGenerator[bytes, None]) -> StreamingResponse:
    """A response of events; an error in between is the last of them, in the protocol's shape."""
    return _EventStream(path, events)


class _EventStream(StreamingResponse):
    """Sends each event as it comes, with few steps in between."""

    def __init__(self, path: str, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_HEADERS)
        self._path, self._events = path, events
        self._direct: Send | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._direct = scope.get(DIRECT)
        await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        """All of the answer."""
        events, send_part = self._events, self._direct or send
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            ended = False
            while not ended:
                try:
                    event = await events.__anext__()
                except StopAsyncIteration:
                    break
                except Exception as error:
                    body, ended = error_body(self._path, as_api_error(error)), True
                    event = named(body) if "type" in body else data(body)
                await send_part({"type": "http.response.body", "body": event, "more_body": True})
            await send_part({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await events.aclose()
