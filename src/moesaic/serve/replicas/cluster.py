"""Replicas on a Ray cluster, or on a Ray of this machine alone.

Ray Serve keeps as many as were asked for alive, on whichever machines have room; its own HTTP proxy is left out, since
it does not ask again when a replica dies.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from moesaic.errors import ConfigError, MissingDependencyError
from moesaic.serve.replicas.asgi import App, Message
from moesaic.serve.replicas.ingress import Ingress, ReplicaLostError, left
from moesaic.serve.replicas.metrics import merged
from moesaic.serve.replicas.routing import Told, together, windows

APPLICATION = "moesaic"
_MOST_AT_ONCE = 10_000  # requests of a replica, which has a queue and limits of its own
_OBJECT_STORE_BYTES = 128 << 20


class Settings(NamedTuple):
    """maker, options: of the application (see Replica), which is also told its `processors`. address: of a cluster
    ("auto", "ray://host:10001"); None: the one of RAY_ADDRESS, else a Ray of this machine. processors: for each
    replica; 0: what there is, shared out."""

    maker: str
    options: Mapping[str, Any]
    replicas: int
    address: str | None = None
    processors: int = 0
    max_body_bytes: int = 32 << 20
    patience_s: float = 60.0


class Cluster:
    """Started replicas, and an application in front of them. Use `with`, and the application in the same thread.

    Raises ConfigError for an impossible number, MissingDependencyError without Ray.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.replicas < 1:
            raise ConfigError(f"replicas={settings.replicas}; use 1 or more")
        self.settings = settings

    def __enter__(self) -> "Cluster":
        ray, serve = _import_ray()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not ray.is_initialized():
            _connect(ray, self.settings)
        from ray.serve.config import RequestRouterConfig

        from moesaic.serve.replicas.replica import Replica
        from moesaic.serve.replicas.router import PrefixRouter

        serve.start(proxy_location="Disabled")

        router: Any = PrefixRouter
        processors = self._processors(ray)
        deployment = serve.deployment(
            Replica,
            name="replica",
            num_replicas=self.settings.replicas,
            max_ongoing_requests=_MOST_AT_ONCE,
            ray_actor_options={"num_cpus": processors},
            request_router_config=RequestRouterConfig(request_router_class=router),
            health_check_period_s=5,
            graceful_shutdown_timeout_s=30,
        )
        options = {**self.settings.options, "processors": max(1, int(processors))}
        self._handle = serve.run(deployment.bind(self.settings.maker, options), name=APPLICATION, route_prefix=None)
        return self

    def __exit__(self, *_: object) -> None:
        ray, serve = _import_ray()
        serve.delete(APPLICATION)
        serve.shutdown()
        ray.shutdown()

    def app(self) -> App:
        """The ingress; /health, /ready, /metrics and /v1/routing are of all replicas together."""
        ingress = Ingress(self, patience_s=self.settings.patience_s, max_body_bytes=self.settings.max_body_bytes)

        async def serve(scope: Message, receive: Any, send: Any) -> None:
            if scope["type"] == "lifespan":
                await _live(receive, send)
            elif scope["type"] == "http" and scope["method"] == "GET" and scope["path"] in _TOGETHER:
                await self._together(scope, send)
            elif scope["type"] == "http" and scope["method"] == "GET" and (every := _every(scope)) is not None:
                await self._stream(scope, receive, send, every)
            else:
                await ingress(scope, receive, send)

        return serve

    async def ask(self, scope: Message, body: bytes, prefix: Sequence[bytes]) -> AsyncIterator[list[Message]]:
        """Ask the replica that fits the prompt's beginning. Raises ReplicaLostError."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        answer = self._handle.options(stream=True).stream.remote(scope, body, prefix=list(prefix))
        ended = False
        try:
            async for messages in answer:
                yield messages
            ended = True
        except RayTaskError:
            raise  # of the application itself: it would come again
        except (RayError, RayServeException) as error:
            ended = True
            raise ReplicaLostError(f"a replica was lost ({type(error).__name__})") from error
        finally:
            if not ended:
                answer.cancel()

    async def _together(self, scope: Message, send: Any) -> None:
        answers = await self._all(scope)
        good = [body for status, body in answers if status == 200]
        path = scope["path"]
        if path == _ROUTING and answers:
            text = json.dumps(together([json.loads(body) for body in good])).encode() if good else answers[0][1]
            await _say(send, 200 if good else answers[0][0], text, b"application/json")
        elif path == "/metrics" and good:
            await _say(send, 200, merged([body.decode() for body in good]), b"text/plain; version=0.0.4; charset=utf-8")
        else:
            status = 200 if good else 503
            text = f'{{"status": "{"ok" if good else "unavailable"}", "replicas": {len(good)}}}'
            await _say(send, status, text.encode(), b"application/json")

    async def _stream(self, scope: Message, receive: Any, send: Any, every: float) -> None:
        """/v1/routing/stream, of what all answer to /v1/routing time and again."""
        asked = {**scope, "path": _ROUTING}

        async def ask() -> Told | None:
            good = [json.loads(body) for status, body in await self._all(asked) if status == 200]
            return together(good) if good else None

        first = await ask()
        if first is None:
            return await self._together(asked, send)
        leaving = asyncio.ensure_future(left(receive))

        async def pause() -> bool:
            await asyncio.wait({leaving}, timeout=every)
            return not leaving.done()

        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for event in windows(ask, first, pause):
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            leaving.cancel()

    async def _all(self, scope: Message) -> list[tuple[int, bytes]]:
        """What each replica answers; those that are dead are left out."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        asked = {name: scope[name] for name in ("type", "method", "path", "query_string", "headers") if name in scope}
        try:
            return await self._handle.broadcast("whole", asked).results_async(timeout_s=10)
        except (RayError, RayServeException, TimeoutError):
            return []

    def _processors(self, ray: Any) -> float:
        if self.settings.processors:
            return self.settings.processors
        return max(0.01, int(100 * ray.cluster_resources().get("CPU", 1) / self.settings.replicas) / 100)


_ROUTING = "/v1/routing"
_TOGETHER = ("/health", "/ready", "/metrics", _ROUTING)


def _every(scope: Message) -> float | None:
    """Seconds between the windows of the experts' load, where that is asked for as it should be; else a replica says
    what is wrong."""
    if scope["path"] != f"{_ROUTING}/stream":
        return None
    try:
        every = float(parse_qs(scope["query_string"].decode()).get("every", ["0.5"])[0])
    except ValueError:
        return None
    return every if 0.1 <= every <= 60 else None


def _import_ray() -> tuple[Any, Any]:
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise MissingDependencyError("replicas need Ray; pip install 'moesaic[serve,ray]'") from error
    return ray, serve


def _connect(ray: Any, settings: Settings) -> None:
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, namespace=APPLICATION)
        return
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        namespace=APPLICATION,
        object_store_memory=_OBJECT_STORE_BYTES,
        configure_logging=False,
    )


async def _live(receive: Any, send: Any) -> None:
    """The replicas live with `with`, not with the server in front of them."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _say(send: Any, status: int, body: bytes, content_type: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]})
    await send({"type": "http.response.body", "body": body, "more_body": False})
