"""Who may ask: keys, and the names by which this server may be asked."""

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from moesaic.serve.operation.keys import Keys, presented
from moesaic.serve.operation.refusals import refuse

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/favicon.ico"})
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})


class RequireKey:
    """Lets in what brings a known key, and everything to `open_paths` (page files are under /page/)."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: Collection[str] = OPEN_PATHS) -> None:
        self.app, self.keys, self.open_paths = app, keys, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.keys or self._is_open(scope["path"]):
            return await self.app(scope, receive, send)
        key = presented(scope["headers"])
        name = None if key is None else self.keys.name_of(key)
        if name is None:
            seen = "no API key" if key is None else "an unknown API key"
            message = f"{seen}; send Authorization: Bearer KEY, or x-api-key: KEY"
            return await refuse(scope, send, 401, message, {"www-authenticate": "Bearer"})
        scope.setdefault("state", {})["key_name"] = name
        await self.app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in self.open_paths or path.startswith("/page/")


class RequireHost:
    """Refuses requests under other names: a site whose name was made to point here could read the answers.

    Those without any name pass: browsers always send one, probes of HTTP/1.0 do not.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app, self.names = app, frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = _host_of(scope) if scope["type"] == "http" else None
        if host is not None and host not in self.names:
            allowed = ", ".join(sorted(self.names))
            return await refuse(scope, send, 403, f"asked by a name that is not allowed; allowed: {allowed}")
        await self.app(scope, receive, send)


def _host_of(scope: Scope) -> str | None:
    """The name in the Host header, without its port; None where there is no such header."""
    sent = next((value for name, value in scope["headers"] if name == b"host"), None)
    if sent is None:
        return None
    value = sent.decode("latin-1").lower()
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.partition(":")[0]
