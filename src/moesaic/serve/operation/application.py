"""The whole application: the protocols behind everything that protects and watches them."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from moesaic.serve.http.app import create_app
from moesaic.serve.http.settings import HttpSettings
from moesaic.serve.operation.access import LOOPBACK_NAMES, OPEN_PATHS, RequireHost, RequireKey
from moesaic.serve.operation.body import LimitBody
from moesaic.serve.operation.drain import Readiness, TakeNothingNew
from moesaic.serve.operation.fleet import Fleet
from moesaic.serve.operation.keys import Keys
from moesaic.serve.operation.logs import RequestLog
from moesaic.serve.operation.metrics import Metrics
from moesaic.serve.operation.observing import Exchange, Observe
from moesaic.serve.operation.rates import LimitRate
from moesaic.serve.operation.routes import loading, probes
from moesaic.serve.operation.settings import ServeSettings


def create_application(
    settings: ServeSettings, fleet: Fleet, keys: Keys, readiness: Readiness, metrics: Metrics, log: RequestLog
) -> ASGIApp:
    """The protocols in front of the models of this process, behind everything that protects and watches them."""
    return protected(create_routes(settings, fleet, readiness, metrics), settings, keys, readiness, metrics, log)


def create_routes(settings: ServeSettings, fleet: Fleet, readiness: Readiness, metrics: Metrics) -> FastAPI:
    """The protocols and what machines ask, unprotected."""
    limits = settings.limits
    routes = create_app(fleet.models, HttpSettings(max_choices=limits.choices, max_new_tokens=limits.new_tokens))
    routes.state.ending = lambda: readiness.state == "draining"
    routes.include_router(probes(readiness, metrics, fleet))
    if settings.load_models:
        routes.include_router(loading(fleet))
    return routes


def protected(
    app: ASGIApp, settings: ServeSettings, keys: Keys, readiness: Readiness, metrics: Metrics, log: RequestLog
) -> ASGIApp:
    """Layers from the outside in: log, names, other sites, readiness, keys, rates, bodies, the application."""
    limits = settings.limits
    app = LimitBody(app, limits)
    if limits.requests_per_minute is not None:
        app = LimitRate(app, limits.requests_per_minute)
    app = RequireKey(app, keys, OPEN_PATHS if settings.metrics_key else {*OPEN_PATHS, "/metrics"})
    app = TakeNothingNew(app, readiness)
    if settings.cors_origins:
        app = CORSMiddleware(
            app, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    names = settings.allowed_hosts or (LOOPBACK_NAMES if is_loopback(settings.host) and not keys else ())
    if names:
        app = RequireHost(app, names)

    def hear(exchange: Exchange) -> None:
        metrics.hear(exchange)
        log.hear(exchange)

    return Observe(app, hear)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host in LOOPBACK_NAMES or host.startswith("127.")
