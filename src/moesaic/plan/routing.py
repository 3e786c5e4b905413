"""How many experts a batch reads: expected when tokens choose evenly, by measured shares, or as a trace shows.

B tokens, E experts, K chosen by each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moesaic.checks import require
from moesaic.config import MoeConfig


class Routing(Protocol):
    """What a plan asks of a model's routing. layer: the number of a layer, since shares differ between them."""

    @property
    def name(self) -> str: ...

    def distinct(self, moe: MoeConfig, layer: int, num_tokens: float) -> float:
        """How many of the E experts so many tokens choose between them."""
        ...

    def imbalance(self, moe: MoeConfig, layer: int, ranks: int, num_tokens: float) -> float:
        """Rows of the busiest of so many ranks, over the mean; 1 or more."""
        ...


def distinct_experts(num_experts: int, top_k: int, num_tokens: float) -> float:
    """E (1 - (1 - K/E)^B): what B tokens read when each chooses K experts evenly and by itself."""
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


def distinct_by_shares(shares_E: Sequence[float] | np.ndarray, num_tokens: float) -> float:
    """The same where expert i is chosen by a token with probability q_i (the sum of all is K).

    Never more than evenly, since 1 - (1 - q)^B is concave in q (Jensen's inequality).
    """
    return float(np.sum(1.0 - (1.0 - np.asarray(shares_E, dtype=float)) ** num_tokens))


def crowding(mean_rows: float, ranks: int) -> float:
    """The busiest rank's rows over the mean, where rows fall on ranks by chance alone.

    The largest of n Poisson numbers of mean m is about m + sqrt(2 m ln n) + ln(n) / 3 (Raab and Steger, 1998, as an
    upper estimate); all rows at the most.
    """
    if ranks <= 1 or mean_rows <= 0:
        return 1.0
    above = math.sqrt(2 * mean_rows * math.log(ranks)) + math.log(ranks) / 3
    return min(1.0 + above / mean_rows, float(ranks))


@dataclass(frozen=True)
class Uniform:
    """Every token chooses any K experts, evenly and by itself."""

    name: str = "uniform"

    def distinct(self, moe: MoeConfig, layer: int, num_tokens: float) -> float:
        return distinct_experts(moe.num_experts, moe.router.top_k, num_tokens)

    def imbalance(self, moe: MoeConfig, layer: int, ranks: int, num_tokens: float) -> float:
        return crowding(num_tokens * moe.router.top_k / ranks, ranks)


@dataclass(frozen=True)
class Shares:
    """Measured shares of each layer's experts, [L, E]: the probability that a token chooses one. Rows repeat in turn.

    placed: whether experts are placed by load (EPLB); otherwise they stand in their order. Raises ConfigError for
    shares that are no probabilities.
    """

    shares_LE: np.ndarray
    name: str = "measured shares"
    placed: bool = False

    def __post_init__(self) -> None:
        sizes = self.shares_LE.ndim == 2 and self.shares_LE.size > 0
        require(sizes, f"shares of shape {self.shares_LE.shape}; give one row of experts a layer")
        within = bool(np.all((self.shares_LE >= 0) & (self.shares_LE <= 1)))
        require(within, "shares below 0 or above 1; each is the probability that a token chooses an expert")

    def of(self, moe: MoeConfig, layer: int) -> np.ndarray:
        """A layer's shares, scaled to K in all. Raises ConfigError where they are of another number of experts."""
        row_E = self.shares_LE[layer % len(self.shares_LE)]
        require(
            len(row_E) == moe.num_experts,
            f"shares of {len(row_E)} experts for a model of {moe.num_experts}; give those of this model",
        )
        return np.minimum(row_E * (moe.router.top_k / row_E.sum()), 1.0)

    def distinct(self, moe: MoeConfig, layer: int, num_tokens: float) -> float:
        return distinct_by_shares(self.of(moe, layer), num_tokens)

    def imbalance(self, moe: MoeConfig, layer: int, ranks: int, num_tokens: float) -> float:
        if ranks <= 1 or moe.num_experts % ranks:
            return 1.0
        loads_E = self.of(moe, layer)
        by_chance = crowding(num_tokens * moe.router.top_k / ranks, ranks)
        if self.placed:  # what no placement can divide is the busiest expert, unless it has copies
            return max(1.0, float(loads_E.max()) * ranks / moe.router.top_k) * by_chance
        loads_R = loads_E.reshape(ranks, -1).sum(1)
        return float(loads_R.max() / loads_R.mean()) * by_chance


def from_counts(counts_LE: np.ndarray, top_k: int, name: str = "measured shares") -> Shares:
    """Shares from how often each expert was chosen, by layer [L, E]."""
    totals_L1 = counts_LE.sum(1, keepdims=True)
    require(bool(np.all(totals_L1 > 0)), "a layer without any routed token; give counts of a longer text")
    return Shares(np.minimum(counts_LE * (top_k / totals_L1), 1.0), name)
