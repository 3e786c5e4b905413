"""What becomes known of an HTTP request while it is answered: written where it is known, read when it is over."""

import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.types import Scope

_MOST_ID = 128


@dataclass
class Notes:
    """One HTTP request. Times are of `time.perf_counter`; tokens are of all its continuations together.

    first_token_at, last_token_at: of any of them. prompts, texts: only where logs are to have them.
    """

    request_id: str
    started_at: float = field(default_factory=time.perf_counter)
    model: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_at: float | None = None
    finish: str | None = None
    prompts: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


current: ContextVar[Notes | None] = ContextVar("notes of the request that is being answered", default=None)
"""Of the task that answers; tasks that it starts see the same notes."""


def request_id_of(scope: Scope) -> str:
    """The client's own x-request-id if it is short and plain, else a new one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    if given and len(given) <= _MOST_ID and given.isascii() and given.replace("-", "").replace("_", "").isalnum():
        return given
    return f"req_{secrets.token_hex(12)}"


def route_of(scope: Scope) -> str:
    """The path as the application declares it; "other" for one that it does not know, of which there is no end."""
    route = scope.get("route")
    return getattr(route, "path", "other")
