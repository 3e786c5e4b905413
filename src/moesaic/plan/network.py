"""What devices send one another in a step, and how long that takes.

t tokens of a device, D hidden, E experts, K chosen, R ranks, N nodes.
"""

import math
from typing import NamedTuple

from moesaic.config import AbsentConfig, LayerConfig, ModelConfig, MoeConfig, OutlinedMoe
from moesaic.plan.flops import Step
from moesaic.plan.formats import Formats
from moesaic.plan.hardware import Device
from moesaic.plan.kinds import layer_kinds
from moesaic.plan.layout import Layout


class Traffic(NamedTuple):
    """Bytes that one device sends to others of its node and to other nodes, and messages that it waits for in turn."""

    link_bytes: float = 0.0
    network_bytes: float = 0.0
    hops: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Traffic(*(mine + its for mine, its in zip(self, other, strict=True)))

    def times(self, count: float) -> "Traffic":
        return Traffic(*(each * count for each in self))

    def seconds(self, device: Device) -> float:
        """Links and network work side by side, so the slower of them counts (DeepSeek-V3, sec. 3.2.2)."""
        share = device.efficiency.network
        links = self.link_bytes / (device.link * share) if self.link_bytes else 0.0
        network = self.network_bytes / ((device.network or device.link) * share) if self.network_bytes else 0.0
        return max(links, network) + self.hops * device.efficiency.hop_s


def distinct_places(places: int, num_experts: int, top_k: int, limit: int | None = None) -> float:
    """Of N places with E / N experts each, how many a token's K choices fall on: N (1 - C(E - E/N, K) / C(E, K)).

    limit: where routing is limited to so many places (DeepSeek-V3, sec. 2.1.2: 4 of 8 nodes).
    """
    each = num_experts / places
    missed = math.prod(max(0.0, num_experts - each - chosen) / (num_experts - chosen) for chosen in range(top_k))
    expected = places * (1.0 - missed)
    return expected if limit is None else min(expected, float(limit))


def all_to_all(
    moe: MoeConfig, hidden_size: int, tokens: float, ranks: int, per_node: int, element_bytes: float
) -> Traffic:
    """One way of an MoE layer's exchange for `tokens` of one rank: each goes once to every node that it needs, over the
    network, and there to every rank that it needs, over links (the scheme of DeepSeek-V3, sec. 3.2.2)."""
    if ranks <= 1:
        return Traffic()
    nodes = -(-ranks // per_node)
    experts, top_k = moe.num_experts, moe.router.top_k
    groups = moe.router.groups
    limited = groups.top_groups if groups is not None and groups.num_groups % nodes == 0 else None
    size = tokens * hidden_size * element_bytes
    reached_ranks = distinct_places(ranks, experts, top_k)
    reached_nodes = distinct_places(nodes, experts, top_k, limited) if nodes > 1 else 1.0
    away = reached_nodes * (nodes - 1) / nodes
    return Traffic(size * reached_ranks * (1 - 1 / min(ranks, per_node)), size * away, 1.0 + (nodes > 1))


def step_traffic(config: ModelConfig, formats: Formats, step: Step, layout: Layout, device: Device) -> Traffic:
    """All that the busiest device sends in a step: sums of tensor parallelism, exchanges of experts, and stages."""
    size, tokens = config.hidden_size, step.tokens / layout.dp
    total = Traffic()
    if layout.tp > 1:
        parts = sum(_num_parts(layer) for layer in config.decoder.layers)
        total += _all_reduce(tokens * size * 2.0, layout.tp, device).times(parts)
    dispatch = 1.0 + 4 / 128 if formats.of("experts").products in ("fp8", "fp4") else 2.0
    own = tokens / layout.tp
    for layer, _, count in layer_kinds(config.layers) if layout.ep > 1 else ():
        moe = layer.feed_forward
        if isinstance(moe, MoeConfig):
            width = (moe.expert_size if isinstance(moe, OutlinedMoe) else None) or size
            total += all_to_all(moe, width, own, layout.ep, device.per_node, dispatch).times(count)
            total += all_to_all(moe, width, own, layout.ep, device.per_node, 2.0).times(count)
    if layout.pp > 1:
        crosses = layout.tp * layout.dp * layout.pp > device.per_node
        sent = own * size * 2.0 * (layout.pp - 1)
        total += Traffic(0.0 if crosses else sent, sent if crosses else 0.0, layout.pp - 1.0)
    return total


def _num_parts(layer: LayerConfig) -> int:
    """Of whose outputs the devices of a tensor-parallel group add their shares up."""
    return sum(not isinstance(part, AbsentConfig) for part in (layer.attention, layer.feed_forward))


def _all_reduce(num_bytes: float, ranks: int, device: Device) -> Traffic:
    """A ring's sum: each rank sends its part 2 (R - 1) / R times."""
    sent = 2.0 * (ranks - 1) / ranks * num_bytes
    within = ranks <= device.per_node
    return Traffic(sent if within else 0.0, 0.0 if within else sent, 1.0)
