"""What a placement is, and how even it is. L layers, E experts, P slots, G ranks, X the most replicas of an expert."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesaic.checks import require

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which expert stands in which slot of which rank, layer by layer.

    expert_of_slot_LP: the expert in each slot. Rank g has the slots g * P/G to (g + 1) * P/G - 1. An expert's tokens
    are to be spread evenly over its replicas.
    """

    expert_of_slot_LP: Ints
    num_experts: int
    num_ranks: int

    @property
    def num_slots(self) -> int:
        return self.expert_of_slot_LP.shape[1]

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    @cached_property
    def num_replicas_LE(self) -> Ints:
        """In how many slots each expert stands; at least one."""
        layers = range(len(self.expert_of_slot_LP))
        return np.stack([np.bincount(self.expert_of_slot_LP[i], minlength=self.num_experts) for i in layers])

    @cached_property
    def slots_of_expert_LEX(self) -> Ints:
        """The slots of each expert in rising order, filled up with -1."""
        num_layers, num_slots = self.expert_of_slot_LP.shape
        order_LP = np.argsort(self.expert_of_slot_LP, axis=1, kind="stable")
        expert_LP = np.take_along_axis(self.expert_of_slot_LP, order_LP, axis=1)
        starts_LE = np.cumsum(self.num_replicas_LE, axis=1) - self.num_replicas_LE
        replica_LP = np.arange(num_slots) - np.take_along_axis(starts_LE, expert_LP, axis=1)
        slots_LEX = np.full((num_layers, self.num_experts, int(self.num_replicas_LE.max())), -1)
        slots_LEX[np.arange(num_layers)[:, None], expert_LP, replica_LP] = order_LP
        return slots_LEX

    def slot_loads(self, load_LE: ArrayLike) -> Floats:
        """What each slot serves of the experts' loads [L, E], every replica an equal part: [L, P]."""
        load = np.asarray(load_LE, np.float64)
        expected = (len(self.expert_of_slot_LP), self.num_experts)
        require(load.shape == expected, f"loads of shape {load.shape} for a placement of {expected} (layers, experts)")
        return np.take_along_axis(load / self.num_replicas_LE, self.expert_of_slot_LP, axis=1)

    def rank_loads(self, load_LE: ArrayLike) -> Floats:
        """What each rank serves: [L, G]. The sum over ranks is the sum over experts."""
        return self.slot_loads(load_LE).reshape(len(self.expert_of_slot_LP), self.num_ranks, -1).sum(-1)

    def balance(self, load_LE: ArrayLike) -> Floats:
        """How even each layer is, mean over maximum of its ranks' loads, [L]: 1 is even, 1/G all on one rank."""
        loads_LG = self.rank_loads(load_LE)
        heaviest_L = loads_LG.max(-1)
        return np.divide(loads_LG.mean(-1), heaviest_L, out=np.ones(len(loads_LG)), where=heaviest_L > 0)
