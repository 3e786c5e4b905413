"""Which experts are alike, and which work together. Pure numpy.

E experts, K choices a token, T tokens, M columns of choices, P tokens of a probe, D hidden.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

ALIKE = 0.98  # cosine of two experts' outputs above which they are duplicates, if they are also as large
SAME_SIZE = 0.8  # the smaller norm over the larger one
_AT_ONCE = 2**20  # tokens
SURE = 4.0  # standard deviations from independence from which a pair counts as working together


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """Two experts that answer the same. similarity: the mean cosine of their outputs for the same tokens.

    usual: what that is for the median pair of the layer. has_same_router: whether the router's rows are alike, too.
    """

    first: int
    second: int
    similarity: float
    usual: float
    has_same_router: bool = False

    @property
    def sentence(self) -> str:
        """What it means, in words."""
        both = "; the router cannot tell them apart either" if self.has_same_router else ""
        return (
            f"experts {self.first} and {self.second} give the same answers (cosine {self.similarity:.3f}; the median "
            f"pair has {self.usual:.2f}): one of them is wasted{both}"
        )


def output_similarity(outputs_EPD: ArrayLike) -> Floats:
    """The mean over tokens of the cosine of each two experts' outputs for the same tokens, [E, E].

    Of outputs that are zero (a killed expert) it is 0, also with itself.
    """
    outputs = np.asarray(outputs_EPD, dtype=np.float64)
    norms = np.linalg.norm(outputs, axis=-1, keepdims=True)
    directions = np.divide(outputs, norms, out=np.zeros_like(outputs), where=norms > 0)
    return np.einsum("epd,fpd->ef", directions, directions) / max(1, outputs.shape[1])


def duplicates(
    outputs_EPD: ArrayLike, router_ED: ArrayLike | None = None, *, alike: float = ALIKE
) -> tuple[Duplicate, ...]:
    """Pairs of experts whose outputs for the same tokens point the same way (mean cosine above `alike`) and are as
    large, the most alike first.

    None where the median pair is that alike, too, or more than half of the experts (of three or more) are so: then the
    layer was grown from copies, or does nothing yet. But copies whose router rows are alike, too, are always told:
    chosen together, with the same gradients, they never part. router_ED: the router's rows.
    """
    outputs = np.asarray(outputs_EPD, dtype=np.float64)
    if len(outputs) < 2 or not outputs.shape[1]:
        return ()
    similarity_EE, sizes_E = output_similarity(outputs), np.sqrt((outputs**2).sum(-1).mean(-1))
    rows, columns = np.triu_indices(len(outputs), 1)
    pairs = similarity_EE[rows, columns]
    usual = float(np.median(pairs))
    if usual > alike and len(pairs) > 1:
        return ()
    found = []
    for at in np.argsort(-pairs, kind="stable"):
        if pairs[at] <= alike:
            break
        one, other = int(rows[at]), int(columns[at])
        if min(sizes_E[one], sizes_E[other]) < SAME_SIZE * max(sizes_E[one], sizes_E[other]):
            continue
        same_router = router_ED is not None and _cosine(np.asarray(router_ED)[[one, other]]) > alike
        similarity = float(pairs[at])
        found.append(
            Duplicate(first=one, second=other, similarity=similarity, usual=usual, has_same_router=same_router)
        )
    alike_experts = {expert for pair in found for expert in (pair.first, pair.second)}
    is_grown = len(alike_experts) > max(2, len(outputs) / 2)
    return tuple(pair for pair in found if pair.has_same_router or not is_grown)


def _cosine(rows_2D: NDArray[np.floating]) -> float:
    one, other = rows_2D.astype(np.float64)
    return float(one @ other / max(1e-300, float(np.linalg.norm(one) * np.linalg.norm(other))))


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two experts that tokens choose together. together: tokens that choose both. lift: over what independent choices
    with the same loads would give. deviations: how many standard deviations that is."""

    first: int
    second: int
    together: int
    lift: float
    deviations: float


@dataclass(frozen=True, kw_only=True, eq=False)
class CoActivation:
    """Which experts are chosen by the same tokens.

    share_EE[i, j] = N_ij / N_i: of the tokens that choose i, the part that also chooses j (OLMoE, arXiv:2409.02060,
    sec. 5.2); the diagonal is 1, rows of experts that nobody chose are 0. chance: (K-1)/(E-1), what an even router
    without preferences has. lift_EE: tokens that choose both over what independent choices with the same loads would
    give; NaN on the diagonal and for experts that nobody chose. pairs: those together more often than independent
    choices would be, strongest first.
    """

    share_EE: Floats
    lift_EE: Floats
    chance: float
    pairs: tuple[Pair, ...]


def co_activation(choices_TM: ArrayLike, num_experts: int, *, most_pairs: int = 20) -> CoActivation:
    """How often experts are chosen together. choices_TM: expert ids, -1 where a token has no such choice."""
    together_EE, num_tokens = pair_counts(choices_TM, num_experts)
    counts_E = np.diagonal(together_EE).astype(np.float64)
    share_EE = np.divide(together_EE, counts_E[:, None], out=np.zeros(together_EE.shape), where=counts_E[:, None] > 0)
    mean_choices = counts_E.sum() / max(1, num_tokens)
    chance = (mean_choices - 1) / max(1, num_experts - 1)
    # Choices of one token exclude each other, so that with K of them every pair expects a little less than by the loads
    # alone: N_i N_j / T times (K-1)/K over (E-1)/E.
    correction = (1 - 1 / max(1.0, mean_choices)) * num_experts / max(1, num_experts - 1)
    expected_EE = correction * np.outer(counts_E, counts_E) / max(1, num_tokens)
    spread_EE = np.sqrt(np.maximum(expected_EE, 1e-12))
    deviations_EE = np.where(expected_EE > 0, (together_EE - expected_EE) / spread_EE, 0.0)
    rows, columns = np.triu_indices(num_experts, 1)
    order = np.argsort(-deviations_EE[rows, columns], kind="stable")[:most_pairs]
    pairs = [
        Pair(
            first=int(i),
            second=int(j),
            together=int(together_EE[i, j]),
            lift=float(together_EE[i, j] / expected_EE[i, j]) if expected_EE[i, j] > 0 else 0.0,
            deviations=float(deviations_EE[i, j]),
        )
        for i, j in zip(rows[order], columns[order], strict=True)
    ]
    lift_EE = np.divide(together_EE, expected_EE, out=np.full(share_EE.shape, np.nan), where=expected_EE > 0)
    np.fill_diagonal(lift_EE, np.nan)
    return CoActivation(
        share_EE=share_EE,
        lift_EE=lift_EE,
        chance=max(0.0, chance),
        pairs=tuple(pair for pair in pairs if pair.deviations > SURE),
    )


def pair_counts(choices_TM: ArrayLike, num_experts: int) -> tuple[NDArray[np.int64], int]:
    """(tokens that choose both of two experts [E, E], tokens that choose any). The diagonal has the loads."""
    is_chosen_TE = chosen(choices_TM, num_experts)
    # Floats, exact to 2^24 tokens: a matrix product of integers is a hundred times slower.
    as_floats = is_chosen_TE.astype(np.float32)
    together_EE = np.zeros((num_experts, num_experts), dtype=np.int64)
    for first in range(0, len(as_floats), _AT_ONCE):
        part = as_floats[first : first + _AT_ONCE]
        together_EE += (part.T @ part).astype(np.int64)
    return together_EE, int(is_chosen_TE.any(axis=1).sum())


def chosen(choices_TM: ArrayLike, num_experts: int) -> NDArray[np.bool_]:
    """Whether each token chose each expert, [T, E]."""
    choices = np.asarray(choices_TM)
    is_chosen_TE = np.zeros((len(choices), num_experts), dtype=bool)
    tokens, columns = np.nonzero(choices >= 0)
    is_chosen_TE[tokens, choices[tokens, columns]] = True
    return is_chosen_TE
