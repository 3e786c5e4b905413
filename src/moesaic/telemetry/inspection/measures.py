"""How much experts differ in what they serve, how often they serve together, how far two routers agree. Pure numpy.

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


def together(tokens_R: np.ndarray, experts_R: np.ndarray, num_experts: int) -> np.ndarray:
    """Tokens that chose both of two experts, int64 [E, E]; an expert with itself: all its tokens.

    A token's rows must stand side by side.
    """
    counts = np.zeros(num_experts * num_experts, dtype=np.int64)
    counts[:: num_experts + 1] = np.bincount(experts_R, minlength=num_experts)
    starts = np.append(True, tokens_R[1:] != tokens_R[:-1]) if len(tokens_R) else np.zeros(0, bool)
    longest = int(np.diff(np.append(np.flatnonzero(starts), len(tokens_R))).max(initial=0))
    for apart in range(1, longest):
        same = tokens_R[apart:] == tokens_R[:-apart]
        left, right = experts_R[:-apart][same], experts_R[apart:][same]
        for a, b in ((left, right), (right, left)):
            counts += np.bincount(a * num_experts + b, minlength=len(counts))
    return counts.reshape(num_experts, num_experts)


def company(together_EE: ArrayLike) -> np.ndarray:
    """How often experts serve together, as a multiple of what their loads alone would bring; float64 [E, E].

    Co-activation N_ij / N_i (OLMoE, arXiv:2409.02060, section 5) over what it would be if the other choices of i's
    tokens fell on the other experts in the proportion of their loads: `(sum_j N_ij / N_i) N_j / sum_{m != i} N_m`,
    which is (K-1)/(E-1) under an even load. 1 is independence; NaN on the diagonal and for experts without company.
    """
    counts = np.asarray(together_EE, dtype=np.float64)
    loads = counts.diagonal().copy()
    apart = counts.copy()
    np.fill_diagonal(apart, 0.0)
    others = loads.sum() - loads
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = apart.sum(1, keepdims=True) * loads[None, :] / others[:, None]
        ratio = np.where(expected > 0, apart / expected, math.nan)
    np.fill_diagonal(ratio, math.nan)
    return ratio


def agreement(left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray], num_experts: int) -> float:
    """The part of the right side's choices that the left side makes as well; chance is K/E under an even load.

    Each side is (token, expert) of its rows. With a checkpoint on the left and the final model on the right this is
    router saturation (OLMoE, arXiv:2409.02060, section 5: `|E_t(c) & E_t(final)| / K`, averaged over tokens). NaN
    without rows.
    """
    if not len(right[0]):
        return math.nan
    cells = [tokens * num_experts + experts for tokens, experts in (left, right)]
    return float(np.isin(cells[1], cells[0]).mean())
