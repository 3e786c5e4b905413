"""GET /v1/routing and /v1/routing/stream: the live load of a model's experts, once or as it goes on."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from moesaic.serve.http import sse
from moesaic.serve.http.access import ServedModels
from moesaic.serve.http.bodies import Answer
from moesaic.serve.http.declared import ERRORS
from moesaic.serve.http.errors import ApiError
from moesaic.serve.live_routing import LONGEST_S, LiveRouting
from moesaic.serve.served import Models, Served

router = APIRouter()

Name = Annotated[str | None, Query(description="the model's name; the first one's if left out")]


class LayerRouting(Answer):
    """counts: rows of each expert. distinct_per_step: how many experts a step had work for, in the mean. load_entropy:
    1 is even. effective_experts: as how many equally loaded ones the load is worth. dead: null: too few rows to tell.
    """

    layer: int
    num_experts: int
    top_k: int
    counts: list[int]
    distinct: int
    distinct_per_step: float | None
    load_entropy: float | None
    effective_experts: float | None
    max_violation: float | None
    dead: list[int] | None


class RoutingTally(Answer):
    """seconds: that the counts are of."""

    seconds: float
    steps: int
    tokens: int
    layers: list[LayerRouting]


class RoutingAnswer(Answer):
    """routes: false for a dense model, which has no experts and no layers here. serving: requests that run and wait,
    the share of the cache that running ones hold, and all tokens that were written.
    """

    object: str
    model: str
    routes: bool
    since_start: RoutingTally
    window: RoutingTally
    serving: dict[str, float | None]


@router.get("/v1/routing", response_model=RoutingAnswer, responses=ERRORS)
async def routing(
    models: ServedModels,
    model: Name = None,
    seconds: Annotated[float, Query(gt=0, le=LONGEST_S, allow_inf_nan=False)] = 10.0,
) -> dict[str, Any]:
    """How tokens fell on the experts, in the last seconds and since the start."""
    served = _find(models, model)
    live = _live(served)
    total, window = live.total(), live.window(seconds)
    return {
        **_head(served),
        "since_start": {"seconds": round(live.age_s, 3), **live.to_json(total)},
        "window": {"seconds": min(seconds, live.age_s), **live.to_json(window)},
        "serving": _serving(served),
    }


@router.get(
    "/v1/routing/stream", response_model=None, responses={200: {"content": {"text/event-stream": {}}}, **ERRORS}
)
async def routing_stream(
    http: Request,
    models: ServedModels,
    model: Name = None,
    every: Annotated[float, Query(ge=0.1, le=60, allow_inf_nan=False)] = 0.5,
) -> Response:
    """Server-sent events: `total`, all since the start, then every so many seconds a `window`: what came since."""
    served = _find(models, model)
    return sse.stream(http.url.path, _events(served, _live(served), every, http.app.state.ending))


async def _events(
    served: Served, live: LiveRouting, every: float, ending: Callable[[], bool]
) -> AsyncGenerator[bytes, None]:
    before, at = live.total(), time.monotonic()
    total = {**_head(served), "seconds": round(live.age_s, 3), **live.to_json(before), "serving": _serving(served)}
    yield sse.named({"type": "total", **total})
    while served.is_open and not ending():
        await asyncio.sleep(every)
        now, then, at = live.total(), at, time.monotonic()
        told = {"seconds": round(at - then, 3), **live.counts(now.less(before)), "serving": _serving(served)}
        yield sse.named({"type": "window", **told})
        before = now


def _serving(served: Served) -> dict[str, Any]:
    """Requests that run and wait, and the share of the cache that running ones hold."""
    if not served.is_open:
        return {}
    stats = served.desk.stats()
    used = stats.held_tokens / stats.cache_tokens if stats.cache_tokens else None
    return {"running": stats.running, "waiting": stats.queued, "cache_used": used, "new_tokens": stats.new_tokens}


def _find(models: Models, name: str | None) -> Served:
    return models.find(next(iter(models)) if name is None else name)


def _head(served: Served) -> dict[str, Any]:
    return {"object": "routing", "model": served.name, "routes": _live(served).routes}


def _live(served: Served) -> LiveRouting:
    if served.routing is None:
        raise ApiError(404, f"{served.name} does not run here: the load of its experts is known where it does")
    return served.routing
