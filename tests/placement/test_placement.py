"""Placement: the published output, a slow reference beside the fast path, and what holds for every load."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import place_experts
from moesaic.errors import ConfigError
from moesaic.placement import METHODS

RECORDED = Path(__file__).parents[3] / "shared" / "data" / "routing"

# The example in EPLB's README (github.com/deepseek-ai/EPLB): two layers of 12 experts, 16 slots on 8 ranks, 2 nodes.
LOAD = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
OUTPUT = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def test_the_published_example_exactly() -> None:
    placement = place_experts(LOAD, num_slots=16, num_ranks=8, num_nodes=2, num_groups=4, method="eplb")
    assert placement.expert_of_slot_LP.tolist() == OUTPUT
    assert placement.num_replicas_LE[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert placement.slots_of_expert_LEX[0, 5:7].tolist() == [[0, 2], [1, -1]]


def slow_pack(loads: list[np.float32], num_packs: int) -> list[list[int]]:
    """balanced_packing as EPLB writes it: the items of each pack in the order of arrival."""
    room = len(loads) // num_packs
    if room == 1:
        return [[item] for item in range(len(loads))]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    weights = [np.float32(0)] * num_packs
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        pack = min((i for i in range(num_packs) if len(packs[i]) < room), key=weights.__getitem__)
        packs[pack].append(item)
        weights[pack] += loads[item]
    return packs


def slow_eplb(load_E: list[int], slots: int, ranks: int, nodes: int, groups: int) -> list[int]:
    """One layer, with lists."""
    size, load = len(load_E) // groups, [np.float32(each) for each in load_E]
    placed: list[int] = []
    for own in slow_pack([np.sum(load[g * size : (g + 1) * size], dtype=np.float32) for g in range(groups)], nodes):
        experts = [group * size + i for group in own for i in range(size)]
        replicas, counts = list(experts), dict.fromkeys(experts, 1)
        while len(replicas) < slots // nodes:
            heaviest = max(experts, key=lambda e: load[e] / np.float32(counts[e]))
            replicas.append(heaviest)
            counts[heaviest] += 1
        packs = slow_pack([load[e] / np.float32(counts[e]) for e in replicas], ranks // nodes)
        placed += [replicas[item] for pack in packs for item in pack]
    return placed


@st.composite
def rooms(draw: st.DrawFn) -> tuple[list[list[int]], dict[str, int]]:
    nodes, ranks_a_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    groups = nodes * draw(st.integers(1, 2)) if draw(st.booleans()) else 1
    num_experts = groups * draw(st.integers(1, 5))
    ranks = nodes * ranks_a_node
    slots = ranks * (-(-num_experts // ranks) + draw(st.integers(0, 2)))
    loads = draw(
        st.lists(st.lists(st.integers(0, 50), min_size=num_experts, max_size=num_experts), min_size=1, max_size=2)
    )
    return loads, {"num_slots": slots, "num_ranks": ranks, "num_nodes": nodes, "num_groups": groups}


@settings(max_examples=60)
@given(rooms())
def test_what_holds_for_every_load(case: tuple[list[list[int]], dict[str, int]]) -> None:
    loads, room = case
    placed = {method: place_experts(loads, method=method, **room) for method in METHODS}
    stays = room["num_groups"] % room["num_nodes"] == 0
    nodes, groups = (room["num_nodes"], room["num_groups"]) if stays else (1, 1)
    slow = [slow_eplb(load_E, room["num_slots"], room["num_ranks"], nodes, groups) for load_E in loads]
    assert placed["eplb"].expert_of_slot_LP.tolist() == slow
    for placement in placed.values():
        assert placement.expert_of_slot_LP.shape == (len(loads), room["num_slots"])
        assert (placement.num_replicas_LE >= 1).all()
        assert np.allclose(placement.rank_loads(loads).sum(-1), np.sum(loads, -1))
    refined = placed["refined"].rank_loads(loads).max(-1)
    assert (refined <= placed["eplb"].rank_loads(loads).max(-1) * (1 + 1e-6)).all()
    num_experts = len(loads[0])
    if num_experts % room["num_ranks"] == 0:
        single = place_experts(loads, method="eplb", **(room | {"num_slots": num_experts}))
        assert (refined <= single.rank_loads(loads).max(-1) * (1 + 1e-6)).all()


def test_groups_stay_on_one_node() -> None:
    load = np.random.default_rng(0).lognormal(0, 1, (3, 32))
    placement = place_experts(load, num_slots=48, num_ranks=8, num_nodes=4, num_groups=8)
    for experts_P in placement.expert_of_slot_LP:
        nodes = [set(experts // 4) for experts in experts_P.reshape(4, -1)]
        assert all(len(groups) == 2 for groups in nodes) and len(set().union(*nodes)) == 8


def recorded_loads() -> dict[str, np.ndarray]:
    olmoe = json.loads((RECORDED / "olmoe_routing_olmoe.json").read_text())["expert_counts"]
    loads = {f"olmoe-{domain}": np.array(counts) for domain, counts in olmoe.items()}
    for task in ("intent", "summary", "translation"):
        with np.load(RECORDED / f"esft_dsv2lite_{task}.npz") as file:
            loads[f"v2-lite-{task}"] = np.stack([np.bincount(ids.ravel(), minlength=64) for ids in file["expert_ids"]])
    return loads


ROOMS: tuple[dict[str, Any], ...] = (
    {"num_slots": 80, "num_ranks": 8},
    {"num_slots": 72, "num_ranks": 8, "num_nodes": 2, "num_groups": 4},
)


@pytest.mark.skipif(not RECORDED.exists(), reason="the recorded routing is not here")
def test_recorded_loads_come_out_no_less_even_than_eplb() -> None:
    gains = []
    for load_LE in recorded_loads().values():
        for room in ROOMS:
            eplb = place_experts(load_LE, method="eplb", **room).balance(load_LE)
            refined = place_experts(load_LE, **room).balance(load_LE)
            none = place_experts(load_LE, method="eplb", **(room | {"num_slots": 64})).balance(load_LE)
            assert (refined >= eplb * (1 - 1e-12)).all() and (refined >= none * (1 - 1e-12)).all()
            gains.append((refined / eplb).mean())
    assert np.mean(gains) > 1


@pytest.mark.parametrize(
    ("room", "message"),
    [
        ({"num_slots": 4, "num_ranks": 4}, "num_slots=4 for 6 experts; give each at least one: 8 divide over 4 ranks"),
        ({"num_slots": 10, "num_ranks": 4}, "does not divide over 4 ranks; use 8 or 12"),
        ({"num_slots": 12, "num_ranks": 4, "num_nodes": 3}, "num_ranks=4 does not divide over 3 nodes"),
        ({"num_slots": 8, "num_ranks": 4, "num_groups": 4}, "6 experts do not divide into 4 groups"),
        ({"num_slots": 8, "num_ranks": 0}, "num_ranks=0; give 1 or more"),
        ({"num_slots": 8, "num_ranks": 4, "method": "best"}, "unknown placement method 'best'"),
    ],
)
def test_what_does_not_fit_is_refused(room: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place_experts([1, 2, 3, 4, 5, 6], **room)


@pytest.mark.parametrize("load", [[], [1.0, -1.0], [1.0, float("nan")]])
def test_loads_that_are_none_are_refused(load: list[float]) -> None:
    with pytest.raises(ConfigError, match="loads"):
        place_experts(load, num_slots=2, num_ranks=1)
