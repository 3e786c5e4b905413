"""The experts' load in replicas, added up."""

import asyncio
import json
from typing import Any

import numpy as np

from moesaic.serve.live_routing import layer_json
from moesaic.serve.replicas.routing import Told, together, windows
from moesaic.telemetry.health import load_entropy
from moesaic.telemetry.load import LayerLoad


def tally(counts: list[int], distinct: int, steps: int, seconds: float) -> dict[str, Any]:
    load = LayerLoad(layer=3, top_k=2, counts_E=np.array(counts), num_tokens=sum(counts) // 2, router_entropy=0.0)
    layers = [layer_json(load, distinct, steps)]
    return {"seconds": seconds, "steps": steps, "tokens": load.num_tokens, "layers": layers}


def answer(counts: list[int], steps: int, running: int) -> dict[str, Any]:
    now = tally(counts, 2 * steps, steps, 10.0 + steps)
    serving = {"running": running, "waiting": 1, "cache_used": 0.5 * running, "new_tokens": 7}
    return {"object": "routing", "model": "m", "routes": True, "since_start": now, "window": now, "serving": serving}


def test_counts_are_added_and_judged_together() -> None:
    found = together([answer([8, 0, 0, 4], 3, 0), answer([0, 6, 0, 2], 1, 1)])
    layer = found["since_start"]["layers"][0]
    assert layer["counts"] == [8, 6, 0, 6] and (layer["layer"], layer["top_k"]) == (3, 2)
    assert layer["distinct_per_step"] == 2.0
    assert layer["load_entropy"] == round(load_entropy([8, 6, 0, 6]), 4)
    assert {name: found["since_start"][name] for name in ("steps", "tokens", "seconds")} == {
        "steps": 4, "tokens": 10, "seconds": 13.0,
    }  # fmt: skip
    assert found["serving"] == {"running": 1, "waiting": 2, "new_tokens": 14, "cache_used": 0.25}


def test_of_one_replica_nothing_changes() -> None:
    assert together([answer([8, 0, 0, 4], 3, 1)]) == answer([8, 0, 0, 4], 3, 1)


def test_windows_are_what_came_since() -> None:
    first = together([answer([8, 0, 0, 4], 3, 0)])
    later: list[Told | None] = [together([answer([9, 1, 0, 4], 4, 1)]), None, together([answer([1, 1, 0, 2], 1, 0)])]
    told = iter(later)

    async def ask() -> Told | None:
        return next(told)

    left = iter([True, True, True, False])

    async def pause() -> bool:
        return next(left)

    async def heard() -> list[dict[str, Any]]:
        events = [event.decode() async for event in windows(ask, first, pause)]
        return [json.loads(event.split("data: ", 1)[1]) for event in events]

    total, window, anew = asyncio.run(heard())
    assert total["type"] == "total" and total["layers"][0]["counts"] == [8, 0, 0, 4]
    assert window["layers"] == [{"layer": 3, "counts": [1, 1, 0, 0], "distinct": 2}]
    assert (window["type"], window["steps"], window["tokens"]) == ("window", 1, 1)
    assert anew["layers"][0]["counts"] == [0, 0, 0, 0], "nothing is taken back"
