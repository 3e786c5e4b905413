"""Which experts are dead, cold or oversized, and when there is too little text to say so. Pure numpy.

E experts, K choices a token, T tokens, W windows.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesaic.telemetry.health import CHANCE_OF_FALSE_ALARM, DEAD_SHARE, HEAVY, load_shares
from moesaic.telemetry.load import LayerLoad

Floats = NDArray[np.float64]
State = Literal["dead", "cold", "fair", "oversized", "unknown"]

COLD_SHARE = 0.5  # of the fair share 1/E; below it an expert counts as cold


@dataclass(frozen=True, kw_only=True)
class ExpertState:
    """How one expert is loaded.

    share: its part of the rows. ratio: that over the fair share 1/E. chance: how likely it is that a fair router
    shows one of E experts at least as far off (a bound; 1 for one that is not off).
    """

    expert: int
    state: State
    rows: int
    share: float
    ratio: float
    chance: float

    @property
    def sentence(self) -> str:
        """What it means, in words."""
        what = f"expert {self.expert} has {self.ratio:.2f} of its fair share"
        return {
            "dead": f"{what}: it is dead, its weights learn nothing",
            "cold": f"{what}: it is cold and learns little",
            "fair": f"{what}",
            "oversized": f"{what}: it does the work of several",
            "unknown": f"{what}, and that may be chance: read more text",
        }[self.state]


def expert_states(
    counts_E: ArrayLike, *, num_tokens: int, top_k: int, clumping: float = 1.0, alarm: float = CHANCE_OF_FALSE_ALARM
) -> tuple[ExpertState, ...]:
    """The state of every expert of one layer: dead below 0.1 of the fair share, cold below 0.5, oversized above 3.

    An expert is called so only if a fair router would show one of E so with a chance below `alarm`; else it is
    "unknown". Where K/E makes three times the fair share impossible, nine tenths of the most possible counts.
    clumping: how many tokens say as much as one drawn alone (see `clumping`): text repeats itself.
    """
    counts = np.asarray(counts_E, dtype=np.float64)
    num_experts, shares_E = counts.size, load_shares(counts)
    if not shares_E.any():
        return tuple(_state(expert, "unknown", 0, 0.0, num_experts, 1.0) for expert in range(num_experts))
    num_drawn = num_tokens / max(1.0, clumping)
    fair = min(1.0, counts.sum() / (num_tokens * num_experts))  # the chance of a fair token to choose a given expert
    chance_E = np.minimum(1.0, num_experts * chance_of_count(counts / max(1.0, clumping), num_drawn, fair))
    most = heavy_ratio(num_experts, top_k)
    found = []
    for expert, (rows, share, chance) in enumerate(zip(counts, shares_E, chance_E, strict=True)):
        state = _judged(share * num_experts, most)
        if state != "fair" and chance >= alarm:
            state = "unknown"
        found.append(_state(expert, state, int(rows), float(share), num_experts, float(chance)))
    return tuple(found)


def _state(expert: int, state: State, rows: int, share: float, num_experts: int, chance: float) -> ExpertState:
    return ExpertState(expert=expert, state=state, rows=rows, share=share, ratio=share * num_experts, chance=chance)


def _judged(ratio: float, most: float) -> State:
    if ratio < DEAD_SHARE:
        return "dead"
    if ratio < COLD_SHARE:
        return "cold"
    return "oversized" if ratio > most else "fair"


def heavy_ratio(num_experts: int, top_k: int) -> float:
    """How many times its fair share makes an expert oversized: 3, or where few experts make that impossible 1 + 0.9 of
    the worst MaxVio, which is E/K - 1."""
    return 1 + min(HEAVY, max(0.0, 0.9 * (num_experts / top_k - 1)))


def chance_of_count(counts_E: ArrayLike, num_tokens: float, fair: float) -> Floats:
    """A bound on the chance that a fair router gives an expert a count at least as far off as this one.

    Of T tokens, each of which chooses it with probability p: P <= exp(-T KL(c/T || p)) (Chernoff, Ann. Math. Stat.
    23(4), 1952). Of none this is (1 - p)^T, exactly.
    """
    counts = np.asarray(counts_E, dtype=np.float64)
    if num_tokens <= 0 or not 0 < fair < 1:
        return np.ones_like(counts)
    seen = np.clip(counts / num_tokens, 0.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        few = np.where(seen > 0, seen * np.log(seen / fair), 0.0)
        many = np.where(seen < 1, (1 - seen) * np.log((1 - seen) / (1 - fair)), 0.0)
    return np.exp(-num_tokens * np.maximum(0.0, few + many))


def tokens_to_tell(num_experts: int, top_k: int, alarm: float = CHANCE_OF_FALSE_ALARM) -> int:
    """The fewest tokens in which a fair router leaves one of E experts empty with a chance below `alarm`.

    E (1 - K/E)^T < alarm, which is about (E/K) ln(E/alarm).
    """
    if top_k >= num_experts:
        return 1
    return math.floor(math.log(alarm / num_experts) / math.log1p(-top_k / num_experts)) + 1


def clumping(counts_WE: ArrayLike, num_tokens_W: ArrayLike) -> float:
    """How many tokens of these windows (documents, batches) say as much as one drawn alone; at least 1.

    The variance of the experts' counts between windows over what independent tokens would show, mean over experts
    (Kish's design effect, Survey Sampling, 1965). Needs two windows; else 1.
    """
    counts, tokens = np.asarray(counts_WE, dtype=np.float64), np.asarray(num_tokens_W, dtype=np.float64)
    is_seen_W = tokens > 0
    counts, tokens = counts[is_seen_W], tokens[is_seen_W]
    if len(tokens) < 2:
        return 1.0
    rate_E = counts.sum(0) / tokens.sum()
    expected = np.maximum(tokens[:, None] * rate_E * np.maximum(1 - rate_E, 0.0), 1e-300)
    varies_E = (rate_E > 0) & (rate_E < 1)
    if not varies_E.any():
        return 1.0
    effect_E = ((counts - tokens[:, None] * rate_E) ** 2 / expected).sum(0) / (len(tokens) - 1)
    return max(1.0, float(effect_E[varies_E].mean()))


def states_of(load: LayerLoad, *, clumping: float = 1.0) -> tuple[ExpertState, ...]:
    """`expert_states` of a recorded load."""
    return expert_states(load.counts_E, num_tokens=load.num_tokens, top_k=load.top_k, clumping=clumping)
