"""Routing of experts that have been placed on ranks: what the busiest rank gets. L MoE layers, E experts, G ranks."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moesaic.config import ModelConfig, MoeConfig
from moesaic.placement import Placement, place_experts
from moesaic.plan.cluster.loads import Floats
from moesaic.plan.routing import crowding, distinct_by_shares


@dataclass(frozen=True)
class Placed:
    """See `moesaic.plan.routing.Routing`. Experts' chances [L, E] and where the experts stand.

    per_batch: whether rows also crowd by chance, batch by batch; false for what holds on average.
    """

    chances_LE: Floats
    placement: Placement
    moe_layers: tuple[int, ...]
    name: str = "placed experts"
    per_batch: bool = True

    def distinct(self, moe: MoeConfig, layer: int, num_tokens: float) -> float:
        """How many experts so many tokens choose between them."""
        return distinct_by_shares(self.chances_LE[self.moe_layers.index(layer)], num_tokens)

    def imbalance(self, moe: MoeConfig, layer: int, ranks: int, num_tokens: float) -> float:
        """Rows of the busiest rank over the mean: of the placement, and by chance."""
        by_chance = crowding(num_tokens * moe.router.top_k / ranks, ranks) if self.per_batch else 1.0
        return float(self.uneven_L[self.moe_layers.index(layer)]) * by_chance

    @cached_property
    def uneven_L(self) -> Floats:
        """Load of the busiest rank over the mean, layer by layer."""
        return 1.0 / self.placement.balance(self.chances_LE)

    @property
    def mean_uneven(self) -> float:
        """Over all layers: by how much the barrier after each of them stretches what depends on the busiest rank."""
        return float(np.mean(self.uneven_L))


def place(
    config: ModelConfig,
    chances_LE: Floats,
    *,
    ranks: int,
    redundant: int = 0,
    per_node: int = 8,
    method: str = "refined",
) -> Placed:
    """Experts on the ranks of one unit, with `redundant` replicas. Groups of the router stay on nodes where they
    divide over them. Raises ConfigError for slots that do not divide over the ranks."""
    moe = config.layers[config.moe_layers[0]].feed_forward
    assert isinstance(moe, MoeConfig), "moe_layers says so"
    groups = moe.router.groups.num_groups if moe.router.groups else 1
    nodes = max(1, ranks // per_node) if ranks % per_node == 0 else 1
    placement = place_experts(
        chances_LE,
        num_slots=chances_LE.shape[1] + redundant,
        num_ranks=ranks,
        num_nodes=nodes,
        num_groups=groups,
        method=method,
    )
    return Placed(chances_LE, placement, config.moe_layers)
