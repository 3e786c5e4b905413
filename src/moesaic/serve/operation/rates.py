"""Requests a minute, of each key or address: a bucket that fills steadily and holds a minute's worth."""

import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from moesaic.serve.operation.refusals import refuse, retry_after

_MOST_CLIENTS = 10_000


class LimitRate:
    """Refuses with 429, and when to come again, whoever asks for more POSTs than `per_minute`."""

    def __init__(self, app: ASGIApp, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.app, self.per_minute, self._clock = app, per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # left, and when that was

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            wait_s = self.take(_client_of(scope))
            if wait_s > 0:
                message = f"more than {self.per_minute} requests a minute; wait {wait_s:.0f} s"
                return await refuse(scope, send, 429, message, retry_after(wait_s))
        await self.app(scope, receive, send)

    def take(self, client: str) -> float:
        """Seconds until this client may ask again; 0: it may now, and has."""
        now = self._clock()
        left, then = self._buckets.pop(client, (float(self.per_minute), now))
        left = min(float(self.per_minute), left + (now - then) * self.per_minute / 60)
        allowed = left >= 1
        self._buckets[client] = (left - allowed, now)
        if len(self._buckets) > _MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) * 60 / self.per_minute


def _client_of(scope: Scope) -> str:
    name = scope.get("state", {}).get("key_name")
    address = scope["client"][0] if scope.get("client") else ""
    return f"key {name}" if name else f"address {address}"
