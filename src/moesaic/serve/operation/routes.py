"""What machines ask of a server: is it alive, is it ready, what has it counted; and loading models."""

from typing import Any, Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from moesaic.serve.http.bodies import Answer, Body, BodyRoute
from moesaic.serve.http.declared import ERRORS
from moesaic.serve.operation.drain import Readiness
from moesaic.serve.operation.fleet import Fleet
from moesaic.serve.operation.metrics import CONTENT_TYPE, Metrics


class Health(Answer):
    status: Literal["ok", "failed"]


class Ready(Answer):
    status: Literal["loading", "ready", "draining"]


class ModelName(Body):
    model: str


class ModelStates(Answer):
    models: dict[str, Literal["ready", "unloaded"]]


def probes(readiness: Readiness, metrics: Metrics, fleet: Fleet) -> APIRouter:
    """/health, /ready and /metrics."""
    router = APIRouter()

    @router.head("/health", include_in_schema=False)
    @router.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> JSONResponse:
        """The process is alive, and so is every model that it has loaded; else it should be started anew."""
        return JSONResponse({"status": "ok"}) if fleet.alive else JSONResponse({"status": "failed"}, 503)

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", response_model=Ready, responses={503: {"model": Ready}})
    async def ready() -> JSONResponse:
        """New requests are taken."""
        return JSONResponse({"status": readiness.state}, 200 if readiness.state == "ready" else 503)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Everything that is counted, for Prometheus."""
        text = metrics.exposition(ready=readiness.state == "ready")
        return Response(text, headers={"content-type": CONTENT_TYPE})

    return router


def loading(fleet: Fleet) -> APIRouter:
    """Loading and unloading models that the settings name."""
    router = APIRouter(route_class=BodyRoute)

    @router.post("/v1/models/load", response_model=ModelStates, responses=ERRORS)
    async def load(body: ModelName) -> dict[str, Any]:
        """Load a model beside those that serve; answers when it is there."""
        await fleet.load(body.model)
        return {"models": fleet.states}

    @router.post("/v1/models/unload", response_model=ModelStates, responses=ERRORS)
    async def unload(body: ModelName) -> dict[str, Any]:
        """Unload a model; its requests end with what they have."""
        await fleet.unload(body.model)
        return {"models": fleet.states}

    return router
