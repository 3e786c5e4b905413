"""One replica of a server on a cluster: its models and protocols; what protects them stands in front of all."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

from fastapi import FastAPI

from moesaic.serve.operation.application import create_routes
from moesaic.serve.operation.drain import Readiness
from moesaic.serve.operation.fleet import Fleet
from moesaic.serve.operation.metrics import Metrics
from moesaic.serve.operation.settings import ServeSettings, settings_of
from moesaic.serve.replicas.cluster import Cluster, Settings

MAKER = f"{__name__}:make_replica"


def cluster_of(settings: ServeSettings, replicas: int, address: str | None) -> Cluster:
    """Replicas of a server, to be entered. Raises ConfigError for an impossible number of them."""
    threads = [model.threads for model in settings.models.values() if model.threads is not None]
    return Cluster(
        Settings(
            MAKER,
            {"settings": asdict(settings)},
            replicas,
            address,
            processors=max(threads, default=0),
            max_body_bytes=settings.limits.body_bytes,
        )
    )


def make_replica(settings: dict[str, Any], processors: int) -> FastAPI:
    """The application of one replica, whose models load as it starts. processors: what each may use."""
    parsed = settings_of(settings)
    models = {name: replace(model, threads=model.threads or processors) for name, model in parsed.models.items()}
    readiness, metrics = Readiness(), Metrics()
    fleet = Fleet(replace(parsed, models=models), metrics)
    app = create_routes(parsed, fleet, readiness, metrics)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def living(of: FastAPI) -> AsyncGenerator[None, None]:
        async with inner(of):
            await fleet.start()
            readiness.state = "ready"
            yield

    app.router.lifespan_context = living
    return app
