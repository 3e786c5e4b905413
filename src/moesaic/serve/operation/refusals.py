"""Answers that middleware gives before a request reaches its route, in the shape of the protocol that was spoken."""

import json
import math
from collections.abc import Mapping

from starlette.types import Scope, Send

from moesaic.serve.http.errors import ApiError, error_body


async def refuse(scope: Scope, send: Send, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
    """Send an error as the whole answer."""
    body = refusal_body(scope["path"], status, message)
    all_headers = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in all_headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def refusal_body(path: str, status: int, message: str) -> bytes:
    """An error as JSON."""
    return json.dumps(error_body(path, ApiError(status, message))).encode()


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to ask again, at least a second from now."""
    return {"retry-after": str(max(1, math.ceil(seconds)))}
