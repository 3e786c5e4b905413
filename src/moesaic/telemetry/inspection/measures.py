"""How much experts differ in what they serve. Pure numpy.

E experts, K choices a token, X labels of some kind (domains, token classes, tokens), R rows.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from moesaic.telemetry.health import load_shares


def information(counts_XE: ArrayLike) -> float:
    """How many bits knowing a token's label tells of the expert that serves it, and the other way round.

    Mutual information, `sum p(x,e) log2(p(x,e) / (p(x) p(e)))`. Of few rows it reads too high, by about
    `(E-1)(X-1) / (2 R ln 2)` (Miller 1955; more where a token's rows or neighbours depend on each other): compare it
    with the same counts of shuffled labels. NaN without rows.
    """
    counts = np.asarray(counts_XE, dtype=np.float64)
    total = counts.sum()
    if not total:
        return math.nan
    joint = counts / total
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return max(0.0, float((joint[there] * np.log2(joint[there] / expected[there])).sum()))


def divergence_from_average(counts_XE: ArrayLike) -> float:
    """How far labels' shares of the experts are from the labels' average, in bits: 0 is all alike, 1 is the most.

    Each label's Jensen-Shannon divergence (Lin, IEEE Trans. Inf. Theory 37(1), 1991) from the plain mean of all
    labels' shares, averaged over labels. Labels without rows do not count; NaN with fewer than two.
    """
    shares = load_shares(counts_XE)
    shares = shares[shares.any(axis=1)]
    if len(shares) < 2:
        return math.nan
    average = shares.mean(0)
    between = _entropy((shares + average) / 2) - (_entropy(shares) + _entropy(average)) / 2
    return max(0.0, float(between.mean()))


def _entropy(shares: np.ndarray) -> np.ndarray:
    return -(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(-1)


def specialisation(counts_XE: ArrayLike, num_tokens_X: ArrayLike) -> float:
    """The average expert's share of the tokens of the label that it serves most: chance is a little above K/E.

    `mean_e max_x N_xe / N_x` (OLMoE, arXiv:2409.02060, section 5: vocabulary specialisation, where labels are tokens).
    Labels must have several tokens each. NaN without labels.
    """
    tokens = np.asarray(num_tokens_X, dtype=np.float64)
    shares = np.asarray(counts_XE, dtype=np.float64)[tokens > 0] / tokens[tokens > 0, None]
    return float(shares.max(0).mean()) if len(shares) else math.nan
