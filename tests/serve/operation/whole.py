"""A whole server in this process, behind a real socket, with tiny models."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.serve.operation.application import create_application
from moesaic.serve.operation.connection import guarded
from moesaic.serve.operation.drain import Readiness
from moesaic.serve.operation.fleet import Fleet
from moesaic.serve.operation.keys import Keys
from moesaic.serve.operation.logs import RequestLog
from moesaic.serve.operation.metrics import Metrics
from moesaic.serve.operation.settings import LogSettings, ServeSettings, settings_of
from tests.serve import tiny
from tests.serve.listening import listening


@contextmanager
def serving(settings: ServeSettings, keys: Keys | None = None) -> Iterator[httpx.Client]:
    """A client of a server that is ready."""
    readiness, metrics = Readiness(), Metrics()
    fleet = Fleet(settings, metrics)
    log = RequestLog(LogSettings(format="none"))
    app = create_application(settings, fleet, keys or Keys([]), readiness, metrics, log)
    with (
        listening(Started(app, fleet, readiness), lifespan="on", http=guarded(settings.limits)) as url,
        httpx.Client(base_url=url) as client,
    ):
        yield client


class Started:
    """An application whose models are loaded before it takes requests, as `Server` does it."""

    def __init__(self, app: ASGIApp, fleet: Fleet, readiness: Readiness) -> None:
        self.app, self.fleet, self.readiness = app, fleet, readiness

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_when_loaded(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self.fleet.start()
                self.readiness.state = "ready"
            await send(message)

        await self.app(scope, receive, send_when_loaded)


def settings(**fields: Any) -> ServeSettings:
    """One model that is loaded, and one that is not."""
    model = {"path": str(tiny.folder()), "threads": 1, "cache": 4096}
    return settings_of({"models": {"one": model, "two": {**model, "at_start": False}}, **fields})
