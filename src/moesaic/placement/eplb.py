"""DeepSeek's expert-parallel load balancer, output for output (github.com/deepseek-ai/EPLB at d52c72d, eplb.py).

L layers, E experts, P slots, G ranks, N nodes; n items go into m packs. Loads are 32-bit floats, as there, so that ties
fall as they fall there; all layers are computed at once.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesaic.placement.placed import Ints

Loads = NDArray[np.float32]


class Packed(NamedTuple):
    """Where items go: the pack of each, and its place within the pack."""

    pack_Ln: Ints
    place_Ln: Ints


def eplb(load_LE: Loads, num_slots: int, num_ranks: int, num_nodes: int, num_groups: int) -> Ints:
    """The expert of every slot [L, P]: groups packed on nodes, replicas made and packed on ranks within each node.

    That is EPLB's hierarchical policy; its global one is the same with one node and one group.
    """
    num_layers, num_experts = load_LE.shape
    original_LE = _experts_by_node(load_LE, num_nodes, num_groups)
    loads = np.take_along_axis(load_LE, original_LE, axis=1).reshape(num_layers * num_nodes, -1)
    expert_of_slot, num_replicas = replicate(loads, num_slots // num_nodes)
    slot_loads = np.take_along_axis(loads / num_replicas.astype(np.float32), expert_of_slot, axis=1)
    packed = pack(slot_loads, num_ranks // num_nodes)
    final = packed.pack_Ln * (num_slots // num_ranks) + packed.place_Ln
    placed = np.take_along_axis(expert_of_slot, _inverse(final), axis=1).reshape(num_layers, num_nodes, -1)
    placed = placed + (np.arange(num_nodes) * (num_experts // num_nodes))[:, None]
    return np.take_along_axis(original_LE, placed.reshape(num_layers, -1), axis=1)


def pack(loads_Ln: Loads, num_packs: int) -> Packed:
    """Items into packs of equal number: the heaviest first, each into the lightest pack that is not full."""
    num_layers, num_items = loads_Ln.shape
    room = num_items // num_packs
    if room == 1:
        items = np.broadcast_to(np.arange(num_items), loads_Ln.shape)
        return Packed(items, np.zeros_like(items))
    pack_Ln, place_Ln = np.zeros(loads_Ln.shape, np.int64), np.zeros(loads_Ln.shape, np.int64)
    weight_Lm = np.zeros((num_layers, num_packs), np.float32)
    filled_Lm = np.zeros((num_layers, num_packs), np.int64)
    layers = np.arange(num_layers)
    for item_L in np.argsort(-loads_Ln, axis=1, kind="stable").T:
        lightest_L = np.where(filled_Lm < room, weight_Lm, np.inf).argmin(axis=1)
        pack_Ln[layers, item_L] = lightest_L
        place_Ln[layers, item_L] = filled_Lm[layers, lightest_L]
        weight_Lm[layers, lightest_L] += loads_Ln[layers, item_L]
        filled_Lm[layers, lightest_L] += 1
    return Packed(pack_Ln, place_Ln)


def replicate(loads_Ln: Loads, num_slots: int) -> tuple[Ints, Ints]:
    """The expert of each slot [L, slots] and how many each has [L, n]: one each, then to the one whose replicas bear
    most."""
    num_layers, num_experts = loads_Ln.shape
    expert_of_slot = np.zeros((num_layers, num_slots), np.int64)
    expert_of_slot[:, :num_experts] = np.arange(num_experts)
    num_replicas = np.ones((num_layers, num_experts), np.int64)
    layers = np.arange(num_layers)
    for slot in range(num_experts, num_slots):
        heaviest_L = (loads_Ln / num_replicas.astype(np.float32)).argmax(axis=1)
        expert_of_slot[:, slot] = heaviest_L
        num_replicas[layers, heaviest_L] += 1
    return expert_of_slot, num_replicas


def _experts_by_node(load_LE: Loads, num_nodes: int, num_groups: int) -> Ints:
    """The experts in the order of the nodes that their groups are packed on, [L, E]."""
    num_layers, num_experts = load_LE.shape
    size = num_experts // num_groups
    groups = pack(load_LE.reshape(num_layers, num_groups, size).sum(-1), num_nodes)
    first = (groups.pack_Ln * (num_groups // num_nodes) + groups.place_Ln) * size
    return _inverse((first[..., None] + np.arange(size)).reshape(num_layers, num_experts))


def _inverse(order: Ints) -> Ints:
    inverse = np.empty_like(order)
    np.put_along_axis(inverse, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), axis=1)
    return inverse
