"""Judges how evenly a router spreads its work. Pure numpy; every formula is stated with its source.

E experts, K choices a token, T tokens, M domains.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesaic.telemetry.load import LayerLoad, LogitFacts, StepLoad

Floats = NDArray[np.float64]

DEAD_SHARE = 0.1  # of the fair share 1/E; below it an expert counts as dead
CHANCE_OF_FALSE_ALARM = 0.01  # that a fair router shows a layer with an empty expert
HEAVY = 2.0  # MaxVio above which a layer is called uneven: its heaviest expert has three times the fair share


def load_shares(counts_E: ArrayLike) -> Floats:
    """Each expert's part of the rows, `c_e / sum(c)`; sums to 1 over the last axis, or all zero without rows."""
    counts = np.asarray(counts_E, dtype=np.float64)
    total = counts.sum(-1, keepdims=True)
    return np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)


def load_entropy(counts_E: ArrayLike) -> float:
    """Evenness of the load, `-sum(p ln p) / ln E`: 1 is perfectly even, 0 is all on one expert.

    Shannon's entropy of the shares over its maximum (Pielou's evenness, 1966). NaN without rows, 1 for a single expert.
    """
    shares_E = load_shares(counts_E)
    return _evenness(_entropy_of_load(shares_E), shares_E.size)


def effective_experts(counts_E: ArrayLike) -> float:
    """As how many equally loaded experts these are worth, `exp(-sum(p ln p))` (Hill's number of order 1, 1973): E is
    even, 1 is all on one. NaN without rows."""
    return math.exp(_entropy_of_load(load_shares(counts_E)))


def max_violation(counts_E: ArrayLike) -> float:
    """MaxVio, `(max(c) - mean(c)) / mean(c)`: 0 is even, E/K - 1 is the worst that K distinct choices allow.

    Source: arXiv:2408.15664 (loss-free balancing). NaN without rows.
    """
    counts = np.asarray(counts_E, dtype=np.float64)
    mean = float(counts.sum()) / counts.size
    return float(counts.max()) / mean - 1.0 if mean > 0 else math.nan


def coefficient_of_variation(counts_E: ArrayLike) -> float:
    """`std(c) / mean(c)`; 0 is even. Its square is the balancing loss of arXiv:1701.06538. NaN without rows."""
    counts = np.asarray(counts_E, dtype=np.float64)
    mean = float(counts.sum()) / counts.size
    away_E = counts - mean
    return math.sqrt(float(away_E @ away_E) / counts.size) / mean if mean > 0 else math.nan


def enough_to_tell(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether an empty expert means anything: a fair router would leave one empty with a chance below 1 %.

    A fair router misses one given expert with all T tokens with chance `(1 - K/E)^T`, and any of E experts with at
    most E times that. (Independent tokens; text repeats itself, so near the limit read a longer window.)
    """
    miss = max(0.0, 1.0 - top_k / num_experts) ** num_tokens
    return num_tokens > 0 and num_experts * miss < CHANCE_OF_FALSE_ALARM


def dead_experts(counts_E: ArrayLike, *, num_tokens: int, top_k: int) -> tuple[int, ...] | None:
    """Experts whose share of the rows is below 0.1/E; None when the window has too few rows to tell."""
    return _dead(load_shares(counts_E), num_tokens, top_k)


def _dead(shares_E: Floats, num_tokens: int, top_k: int) -> tuple[int, ...] | None:
    if not enough_to_tell(num_tokens, top_k, shares_E.size):
        return None
    return tuple(np.flatnonzero(shares_E < DEAD_SHARE / shares_E.size).tolist())


def domain_shares(counts_ME: ArrayLike) -> Floats:
    """For each domain, the part of its rows that each expert serves; every domain that has rows sums to 1."""
    return load_shares(counts_ME)


def domain_divergence(counts_ME: ArrayLike) -> float:
    """How differently domains use the experts: 0 is all alike, 1 is no expert shared by two domains.

    The Jensen-Shannon divergence of the M domains' shares with equal weights, over its maximum:
    `(H(mean_m p_m) - mean_m H(p_m)) / ln M` (Lin, IEEE Trans. Inf. Theory 37(1), 1991). Domains without
    rows do not count; NaN with fewer than two. Of few rows N it reads about (E-1)(M-1) / (2 N ln M) too high.
    """
    shares_ME = domain_shares(counts_ME)
    shares_ME = shares_ME[shares_ME.any(axis=1)]
    if len(shares_ME) < 2:
        return math.nan
    spread = _entropy(shares_ME.mean(0)) - float(np.mean([_entropy(shares_E) for shares_E in shares_ME]))
    return min(1.0, max(0.0, spread / math.log(len(shares_ME))))


def _evenness(entropy: float, num_experts: int) -> float:
    """An entropy of so many shares over its maximum; 1 for a single one, NaN where it is unknown."""
    return entropy / math.log(num_experts) if num_experts > 1 else entropy + 1.0


def _entropy_of_load(shares_E: Floats) -> float:
    """`_entropy`; NaN without rows."""
    return _entropy(shares_E) if shares_E.any() else math.nan


def _entropy(shares_E: Floats) -> float:
    """`-sum(p ln p)` in nats, with 0 ln 0 = 0."""
    positive = shares_E[shares_E > 0]
    return max(0.0, float(-(positive * np.log(positive)).sum()))


@dataclass(frozen=True, kw_only=True)
class LayerHealth:
    """One layer's load in numbers. `dead` is None when there were too few rows to tell.

    Entropies are over ln E. router_entropy is a token's, in the mean: 1 is a router that cannot decide, 0 one that is
    certain. average_entropy is that of the mean scores: 1 where all experts are wanted alike. Their difference is what
    a token tells of its experts. dropped_share: of the rows, by a capacity. logits: None where there are none.
    """

    layer: int
    num_experts: int
    num_tokens: int
    top_k: int
    heaviest: int
    max_violation: float
    load_entropy: float
    coefficient_of_variation: float
    router_entropy: float
    dead: tuple[int, ...] | None
    effective_experts: float = math.nan
    average_entropy: float = math.nan
    dropped_share: float = 0.0
    logits: LogitFacts | None = None

    @property
    def is_uneven(self) -> bool:
        """MaxVio above 2, or nine tenths of the worst possible where few experts make that smaller."""
        return self.max_violation > min(HEAVY, 0.9 * (self.num_experts / self.top_k - 1))

    @classmethod
    def of(cls, load: LayerLoad) -> "LayerHealth":
        most = math.log(load.num_experts) if load.num_experts > 1 else math.inf
        shares_E = load_shares(load.counts_E)
        entropy = _entropy_of_load(shares_E)
        return cls(
            layer=load.layer,
            num_experts=load.num_experts,
            num_tokens=load.num_tokens,
            top_k=load.top_k,
            heaviest=int(load.counts_E.argmax()),
            max_violation=max_violation(load.counts_E),
            load_entropy=_evenness(entropy, load.num_experts),
            coefficient_of_variation=coefficient_of_variation(load.counts_E),
            router_entropy=load.router_entropy / most,
            dead=_dead(shares_E, load.num_tokens, load.top_k),
            effective_experts=math.exp(entropy),
            average_entropy=load.average_entropy / most,
            dropped_share=load.dropped_share,
            logits=load.logits,
        )


@dataclass(frozen=True, kw_only=True)
class RouterHealth:
    """All routed layers' health, and one sentence about it."""

    layers: tuple[LayerHealth, ...]

    @classmethod
    def of(cls, load: StepLoad) -> "RouterHealth":
        return cls(layers=tuple(LayerHealth.of(layer) for layer in load.layers))

    @property
    def max_violation(self) -> float:
        """Mean of the layers' MaxVio, as arXiv:2408.15664 reports it; NaN when nothing was routed."""
        return _mean([layer.max_violation for layer in self.layers])

    @property
    def load_entropy(self) -> float:
        return _mean([layer.load_entropy for layer in self.layers])

    @property
    def router_entropy(self) -> float:
        return _mean([layer.router_entropy for layer in self.layers])

    @property
    def num_experts(self) -> int:
        return sum(layer.num_experts for layer in self.layers)

    @property
    def dead(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) of every expert known to be dead."""
        return tuple((layer.layer, expert) for layer in self.layers for expert in layer.dead or ())

    @property
    def is_healthy(self) -> bool:
        return self.verdict == "healthy"

    @property
    def verdict(self) -> str:
        """ "healthy", or what is wrong and where."""
        if not self.layers:
            return "no routed layers"
        unknown = [str(layer.layer) for layer in self.layers if layer.dead is None]
        findings = [finding for finding in (self._dead_text(), self._uneven_text()) if finding]
        if unknown:
            findings.append(f"too few rows to tell in layer {', '.join(unknown)}")
        return "; ".join(findings) or "healthy"

    def _dead_text(self) -> str:
        if not self.dead:
            return ""
        named = ", ".join(f"layer {layer} expert {expert}" for layer, expert in self.dead[:6])
        more = f" and {len(self.dead) - 6} more" if len(self.dead) > 6 else ""
        return f"{len(self.dead)} of {self.num_experts} experts dead: {named}{more}"

    def _uneven_text(self) -> str:
        uneven = [layer for layer in self.layers if layer.is_uneven]
        named = ", ".join(
            f"layer {layer.layer} expert {layer.heaviest} has {layer.max_violation + 1:.1f} times its fair share"
            for layer in uneven[:3]
        )
        more = f" and {len(uneven) - 3} more layers" if len(uneven) > 3 else ""
        return f"uneven: {named}{more}" if uneven else ""


def _mean(values: list[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan
