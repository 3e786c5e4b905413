"""The experts' load in many replicas as one: their counts are added up, and judged together."""

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moesaic.serve.http import sse
from moesaic.serve.live_routing import layer_json
from moesaic.telemetry.load import LayerLoad

Told = Mapping[str, Any]  # what /v1/routing answers, of one replica or of all


def together(answers: Sequence[Told]) -> dict[str, Any]:
    """The answers of at least one replica to /v1/routing as one. Seconds are those of the oldest."""
    head = {name: answers[0][name] for name in ("object", "model", "routes")}
    tallies = {name: _sum([answer[name] for answer in answers]) for name in ("since_start", "window")}
    return {**head, **tallies, "serving": _serving([answer["serving"] for answer in answers])}


async def windows(
    ask: Callable[[], Awaitable[Told | None]], first: Told, pause: Callable[[], Awaitable[bool]]
) -> AsyncIterator[bytes]:
    """Events as /v1/routing/stream has them. ask: `together`, None while nobody answers; first: its first answer.
    pause: waits for the next window; false: that was the last.
    """
    head = {name: first[name] for name in ("object", "model", "routes")}
    before, at = first["since_start"], time.monotonic()
    yield sse.named({"type": "total", **head, **before, "serving": first["serving"]})
    while await pause():
        if (answer := await ask()) is not None:
            then, at, now = at, time.monotonic(), answer["since_start"]
            seconds = round(at - then, 3)
            yield sse.named({"type": "window", "seconds": seconds, **_less(now, before), "serving": answer["serving"]})
            before = now


def _sum(tallies: Sequence[Told]) -> dict[str, Any]:
    steps, tokens = (sum(tally[name] for tally in tallies) for name in ("steps", "tokens"))
    layers = [_layer(same, steps, tokens) for same in zip(*(tally["layers"] for tally in tallies), strict=True)]
    return {"seconds": max(tally["seconds"] for tally in tallies), "steps": steps, "tokens": tokens, "layers": layers}


def _layer(same: Sequence[Told], steps: int, tokens: int) -> dict[str, Any]:
    load = LayerLoad(
        layer=same[0]["layer"],
        top_k=same[0]["top_k"],
        counts_E=np.sum([each["counts"] for each in same], axis=0),
        num_tokens=tokens,
        router_entropy=math.nan,
    )
    return layer_json(load, sum(each["distinct"] for each in same), steps)


def _less(now: Told, before: Told) -> dict[str, Any]:
    """What came since. A replica that was started anew counts from nothing, and is not missed below that."""
    layers = [
        {
            "layer": layer["layer"],
            "counts": np.maximum(np.subtract(layer["counts"], earlier["counts"]), 0).tolist(),
            "distinct": max(0, layer["distinct"] - earlier["distinct"]),
        }
        for layer, earlier in zip(now["layers"], before["layers"], strict=True)
    ]
    return {name: max(0, now[name] - before[name]) for name in ("steps", "tokens")} | {"layers": layers}


def _serving(each: Sequence[Told]) -> dict[str, Any]:
    """Requests and tokens of all; of their caches the mean share."""
    told = [one for one in each if one]
    if not told:
        return {}
    shares = [one["cache_used"] for one in told if one["cache_used"] is not None]
    counts = {name: sum(one[name] for one in told) for name in ("running", "waiting", "new_tokens")}
    return {**counts, "cache_used": sum(shares) / len(shares) if shares else None}
