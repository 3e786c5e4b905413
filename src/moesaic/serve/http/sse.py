"""Server-sent events."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic_core import to_json

from moesaic.serve.http.errors import as_api_error, error_body

DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold events back


def data(value: Mapping[str, Any]) -> bytes:
    """An event as OpenAI's protocol has it."""
    return b"data: " + to_json(value) + b"\n\n"


def named(value: Mapping[str, Any]) -> bytes:
    """An event under the name of its type, as Anthropic's protocol and OpenAI's responses have it."""
    return b"event: " + value["type"].encode() + b"\ndata: " + to_json(value) + b"\n\n"


def stream(path: str, events: AsyncGenerator[bytes, None]) -> StreamingResponse:
    """A response of events; an error in between is the last of them, in the protocol's shape."""
    return StreamingResponse(_told(path, events), media_type="text/event-stream", headers=_HEADERS)


async def _told(path: str, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        async for event in events:
            yield event
    except Exception as error:
        body = error_body(path, as_api_error(error))
        yield named(body) if "type" in body else data(body)
    finally:
        await events.aclose()
