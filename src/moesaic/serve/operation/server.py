"""The server's life: it listens, loads, serves, drains, ends."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from moesaic.errors import ConfigError
from moesaic.serve.operation.application import create_routes, protected
from moesaic.serve.operation.connection import guarded
from moesaic.serve.operation.drain import Readiness
from moesaic.serve.operation.fleet import Fleet
from moesaic.serve.operation.keys import Keys
from moesaic.serve.operation.logs import RequestLog
from moesaic.serve.operation.metrics import Metrics
from moesaic.serve.operation.settings import ServeSettings

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listen(settings: ServeSettings) -> socket.socket:
    """A socket that listens. Raises ConfigError for an address that cannot be had."""
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        number = error.errno if isinstance(error, OSError) and not isinstance(error, socket.gaierror) else None
        reason = error if number is None else os.strerror(number)
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port}: {reason}; choose another with --host or --port"
        ) from error


def address_of(settings: ServeSettings, sock: socket.socket) -> str:
    """The URL under which a socket is reached."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.tls_cert else 'http'}://{host}:{sock.getsockname()[1]}"


class Server:
    """A whole server on a socket; `run` returns when it has ended.

    say: told what happens, in lines for people. replicas: answers in place of models of this process.
    """

    def __init__(
        self,
        settings: ServeSettings,
        keys: Keys,
        sock: socket.socket,
        say: Callable[[str], None],
        replicas: ASGIApp | None = None,
    ) -> None:
        self.settings, self.sock, self.say = settings, sock, say
        self.readiness, self.metrics = Readiness(), Metrics()
        self.fleet = Fleet(settings if replicas is None else replace(settings, models={}), self.metrics, say)
        log = RequestLog(settings.log)
        inner = replicas or create_routes(settings, self.fleet, self.readiness, self.metrics)
        app = protected(inner, settings, keys, self.readiness, self.metrics, log)
        self._uvicorn = _Uvicorn(_config(app, settings), self._hear_signal)
        self._ending = False
        self._draining: asyncio.Future[None] | None = None

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until a signal ends it. ready: called when new requests are taken.

        Raises MoesaicError for a model that cannot be run.
        """
        with asyncio.Runner(loop_factory=self._uvicorn.config.get_loop_factory()) as runner:
            runner.run(self._serve(ready))

    async def _serve(self, ready: Callable[[], None]) -> None:
        serving = asyncio.ensure_future(self._uvicorn.serve(sockets=[self.sock]))
        try:
            await self.fleet.start()
        except BaseException:
            self._uvicorn.should_exit = True
            await serving
            raise
        gc.collect()
        gc.freeze()  # what is there now stays: looking through it again and again would hold up tokens
        self.readiness.state = "ready"
        ready()
        await serving

    def _hear_signal(self, loop: asyncio.AbstractEventLoop) -> None:
        """The first one lets requests finish, a second one does not; nor is there anything to finish while it loads."""
        if self._ending or self.readiness.state != "ready":
            os._exit(0)  # threads in native code would hold up any other end
        self._ending = True
        loop.call_soon_threadsafe(self._begin_draining)

    def _begin_draining(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        answering = self.readiness.answering
        seconds = self.settings.drain_seconds
        self.say(f"ending: {answering} requests have {seconds:g} s to finish; a second signal ends at once")
        unfinished = await self.readiness.drain(seconds, self.fleet.end_all)
        if unfinished:
            self.say(f"{unfinished} requests ended with what they had")
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn that hands signals on."""

    def __init__(self, config: uvicorn.Config, hear_signal: Callable[[asyncio.AbstractEventLoop], None]) -> None:
        super().__init__(config)
        self._hear_signal = hear_signal

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """For as long as the block runs. Unlike uvicorn's, it does not raise them again afterwards."""
        loop = asyncio.get_running_loop()

        def hear(_number: int, _frame: FrameType | None) -> None:
            self._hear_signal(loop)

        before = {number: signal.signal(number, hear) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _config(app: Any, settings: ServeSettings) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=guarded(settings.limits),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=round(settings.limits.keep_alive_s),
        timeout_graceful_shutdown=5,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    try:
        config.load()
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(f"TLS with {settings.tls_cert} and {settings.tls_key}: {error}; give a PEM pair") from error
    return config
