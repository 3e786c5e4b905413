"""Chooses where experts stand. L layers, E experts, P slots, G ranks, N nodes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moesaic.checks import require
from moesaic.placement.eplb import eplb
from moesaic.placement.placed import Floats, Ints, Placement
from moesaic.placement.refine import refine
from moesaic.registry import Registry


class Room(NamedTuple):
    """What experts are placed in; slots are divided over ranks, ranks over nodes, and groups of experts over nodes."""

    num_slots: int
    num_ranks: int
    num_nodes: int
    num_groups: int


METHODS: Registry[Callable[[Floats, Room], Ints]] = Registry("placement method")
"""Name -> a function from loads [L, E] and the room to the expert of every slot [L, P]."""


def place_experts(
    load_LE: ArrayLike,
    *,
    num_slots: int,
    num_ranks: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    method: str = "refined",
) -> Placement:
    """Place experts, the busy ones several times, so that all ranks get about the same load.

    load_LE: rows of each expert, measured or expected, one row a layer ([E] for one layer). num_slots: of all ranks
    together, at least E; what is beyond E becomes replicas. num_groups: groups of neighbouring experts, out of few of
    which a token chooses (DeepSeek-V3 has 8). If they divide over the nodes, each stays on one node (hierarchical, for
    prefill on a few nodes); otherwise nodes do not matter (global, for decode on many).

    method "eplb" gives DeepSeek's own output (github.com/deepseek-ai/EPLB); "refined" goes on from there by exchanges
    and is never less even, nor less even than without replicas where E divides over the ranks; "in_order" looks at no
    load: experts stand in their order, and the first ones again.

    >>> placement = place_experts([[90, 10, 10, 10]], num_slots=6, num_ranks=3)
    >>> placement.expert_of_slot_LP.tolist(), placement.rank_loads([[90, 10, 10, 10]]).tolist()
    ([[0, 1, 0, 2, 0, 3]], [[40.0, 40.0, 40.0]])

    Raises ConfigError for loads that are none, and for numbers that do not divide.
    """
    load = np.atleast_2d(np.asarray(load_LE, np.float64))
    require(
        load.ndim == 2 and load.size > 0, f"loads of shape {load.shape}; give one row a layer, one number an expert"
    )
    require(
        bool(np.isfinite(load).all()) and bool((load >= 0).all()), "loads below 0 or not finite; give counts of rows"
    )
    num_experts = load.shape[1]
    _check(num_experts, num_slots, num_ranks, num_nodes, num_groups)
    stays = num_groups % num_nodes == 0
    room = Room(num_slots, num_ranks, num_nodes if stays else 1, num_groups if stays else 1)
    return Placement(expert_of_slot_LP=METHODS[method](load, room), num_experts=num_experts, num_ranks=num_ranks)


@METHODS.register("in_order")
def _in_order(load_LE: Floats, room: Room) -> Ints:
    return np.broadcast_to(np.arange(room.num_slots) % load_LE.shape[1], (len(load_LE), room.num_slots))


@METHODS.register("eplb")
def _published(load_LE: Floats, room: Room) -> Ints:
    return eplb(load_LE.astype(np.float32), *room)


@METHODS.register("refined")
def _refined(load_LE: Floats, room: Room) -> Ints:
    """Per layer and node the most even of: EPLB's output, and EPLB's without replicas, each after exchanges."""
    candidates = [_published(load_LE, room)]
    if load_LE.shape[1] % room.num_ranks == 0:
        single = _published(load_LE, room._replace(num_slots=load_LE.shape[1]))
        candidates.append(_fill_up(single, room))
    best = np.empty((len(load_LE), room.num_slots), np.int64)
    for layer, load_E in enumerate(load_LE):
        refined = [_exchanged(load_E, expert_of_slot_LP[layer], room) for expert_of_slot_LP in candidates]
        best[layer] = min(refined, key=lambda expert_of_slot_P: _heaviest(load_E, expert_of_slot_P, room.num_ranks))
    return best


def _fill_up(expert_of_slot_LE: Ints, room: Room) -> Ints:
    """More slots of the experts that a rank has, which leaves every rank's load as it is."""
    num_layers = len(expert_of_slot_LE)
    own = expert_of_slot_LE.reshape(num_layers, room.num_ranks, -1)
    places = np.arange(room.num_slots // room.num_ranks) % own.shape[-1]
    return own[..., places].reshape(num_layers, -1)


def _exchanged(load_E: Floats, expert_of_slot_P: Ints, room: Room) -> Ints:
    loads_P = _slot_loads(load_E, expert_of_slot_P)
    by_node = expert_of_slot_P.reshape(room.num_nodes, -1)
    orders = (refine(loads, room.num_ranks // room.num_nodes) for loads in loads_P.reshape(room.num_nodes, -1))
    return np.concatenate([experts[order] for experts, order in zip(by_node, orders, strict=True)])


def _slot_loads(load_E: Floats, expert_of_slot_P: Ints) -> Floats:
    return (load_E / np.maximum(np.bincount(expert_of_slot_P, minlength=len(load_E)), 1))[expert_of_slot_P]


def _heaviest(load_E: Floats, expert_of_slot_P: Ints, num_ranks: int) -> float:
    return float(_slot_loads(load_E, expert_of_slot_P).reshape(num_ranks, -1).sum(-1).max())


def _check(num_experts: int, num_slots: int, num_ranks: int, num_nodes: int, num_groups: int) -> None:
    sizes = {"num_slots": num_slots, "num_ranks": num_ranks, "num_nodes": num_nodes, "num_groups": num_groups}
    for name, size in sizes.items():
        require(size > 0, f"{name}={size}; give 1 or more")
    smallest = math.ceil(num_experts / num_ranks) * num_ranks
    require(
        num_slots >= num_experts,
        f"num_slots={num_slots} for {num_experts} experts; give each at least one: {smallest} divide over {num_ranks} "
        "ranks",
    )
    near = [size for size in (num_slots // num_ranks * num_ranks, -(-num_slots // num_ranks) * num_ranks) if size]
    require(
        num_slots % num_ranks == 0,
        f"num_slots={num_slots} does not divide over {num_ranks} ranks; use "
        f"{' or '.join(str(size) for size in near if size >= num_experts)}",
    )
    require(num_ranks % num_nodes == 0, f"num_ranks={num_ranks} does not divide over {num_nodes} nodes; change one")
    groups = [count for count in range(1, num_experts + 1) if num_experts % count == 0]
    require(
        num_experts % num_groups == 0,
        f"{num_experts} experts do not divide into {num_groups} groups; use one of {groups}",
    )
