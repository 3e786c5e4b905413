"""One expert's tokens shared by two: how the router's rows must stand so that the pair is wanted as the one was.

T tokens, D hidden, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.layers.router import BATCH_NORM_EPSILON, RouterLayer
from moesaic.routing.routers import RouterInput

LEAST_SPREAD = 0.5  # of logits, by which two halves are told apart
BISECTIONS = 40
CLOSED = -1e4  # a logit that nobody chooses
LOWEST, HIGHEST = -30.0, 30.0  # shifts of logits that are looked at


@dataclass(frozen=True, kw_only=True)
class Rows:
    """New router rows [D] for the expert and its twin.

    constant: the bias of both where the router has one, else 0 (it is in the rows). mass_before, mass_after: the
    pair's probability, mean over tokens.
    """

    first_D: Tensor
    second_D: Tensor
    constant: float
    mass_before: float
    mass_after: float


@torch.no_grad()
def split_rows(router: RouterLayer, x_TD: Tensor, busy: int, other: int, *, given_away: bool = False) -> Rows:
    """Rows that send half of `busy`'s tokens to `other`, and keep the probability mass that both had together.

    The halves lie to both sides of the first principal direction of the tokens that choose `busy`, so that the twins
    see different tokens from the first step on (rows that are merely equal would stay equal: ties always go one way).
    With s a token's place along it (mean 0, deviation 1), logits become z + a s + c and z - a s + c; c is found so that
    the mean over tokens of both scores (as shares) is what it was: -ln 2 for softmax where a is small.
    given_away: that the other's own mass has gone to a third expert.
    Where logits are normalised over the batch no constant remains of c: each of the pair is wanted as any expert is.
    """
    weight_ED, bias_E = _wide(router)
    x_TD = x_TD.float()
    logits_TE = x_TD @ weight_ED.T if bias_E is None else x_TD @ weight_ED.T + bias_E
    if given_away:
        logits_TE[:, other] = CLOSED
    before = _mass(router, logits_TE, (busy, other))
    chosen_T = (_choices(router, logits_TE) == busy).any(-1)
    some_TD = x_TD[chosen_T] if int(chosen_T.sum()) > 2 else x_TD
    spread = max(LEAST_SPREAD, _spread(logits_TE))
    direction_D, mean = _principal(some_TD)
    one_D = constant_row(x_TD)
    along_D = spread * (direction_D - mean * one_D)

    def rows(shift: float) -> tuple[Tensor, Tensor]:
        constant_D = shift * one_D if bias_E is None else torch.zeros_like(one_D)
        return weight_ED[busy] + along_D + constant_D, weight_ED[busy] - along_D + constant_D

    def mass(shift: float) -> float:
        trial_TE, constant = logits_TE.clone(), 0.0 if bias_E is None else float(bias_E[busy]) + shift
        for expert, row_D in zip((busy, other), rows(shift), strict=True):
            trial_TE[:, expert] = x_TD @ row_D + constant
        return _mass(router, trial_TE, (busy, other))

    shift = 0.0 if router.config.batch_norm else _bisect(mass, before)
    first_D, second_D = rows(shift)
    constant = 0.0 if bias_E is None else float(bias_E[busy]) + shift
    return Rows(first_D=first_D, second_D=second_D, constant=constant, mass_before=before, mass_after=mass(shift))


@torch.no_grad()
def raised_row(router: RouterLayer, x_TD: Tensor, expert: int, gone: int) -> tuple[Tensor, float]:
    """(the row, the bias) that give one expert the probability mass that it and another had; the other has none.

    As they are, where logits are normalised over the batch: nothing of a constant would remain.
    """
    weight_ED, bias_E = _wide(router)
    x_TD = x_TD.float()
    logits_TE = x_TD @ weight_ED.T if bias_E is None else x_TD @ weight_ED.T + bias_E
    wanted, one_D = _mass(router, logits_TE, (expert, gone)), constant_row(x_TD)

    def mass(shift: float) -> float:
        trial_TE = logits_TE.clone()
        trial_TE[:, gone] = CLOSED
        trial_TE[:, expert] += shift if bias_E is not None else shift * (x_TD @ one_D)
        return _mass(router, trial_TE, (expert,))

    shift = 0.0 if router.config.batch_norm else _bisect(mass, wanted)
    if bias_E is not None:
        return weight_ED[expert], float(bias_E[expert]) + shift
    return weight_ED[expert] + shift * one_D, 0.0


def constant_row(x_TD: Tensor) -> Tensor:
    """k [D] with k x near 1 for these tokens, and 1 in their mean: what stands in for a constant where a router has no
    bias. Ridge regression; zeros where the tokens have no common part (then a shift is not possible)."""
    x_TD = x_TD.double()
    moment_DD = x_TD.T @ x_TD / len(x_TD)
    moment_DD.diagonal().add_(1e-2 * float(moment_DD.diagonal().mean()) + 1e-12)
    mean_D = x_TD.mean(0)
    row_D = torch.linalg.solve(moment_DD, mean_D)
    level = float(row_D @ mean_D)  # R² of the fit
    return (row_D / level if level > 0.1 else torch.zeros_like(row_D)).float()


def _spread(logits_TE: Tensor) -> float:
    """The deviation of a token's logits, read off their upper half: the logits of ill rows, far off, are not in it."""
    middle_T, upper_T = (logits_TE.quantile(share, dim=1) for share in (0.5, 0.75))
    return float((upper_T - middle_T).median()) / 0.6745  # the upper quarter of a normal distribution


def _principal(x_TD: Tensor) -> tuple[Tensor, float]:
    """(u [D], m): u x - m has mean 0 and deviation 1 over these tokens, along their first principal direction."""
    mean_D = x_TD.double().mean(0)
    centred_TD = x_TD.double() - mean_D
    moment_DD = centred_TD.T @ centred_TD / len(x_TD)
    values_D, vectors_DD = torch.linalg.eigh(moment_DD)
    scale = max(float(values_D[-1]), 1e-12) ** -0.5
    direction_D = vectors_DD[:, -1] * scale
    direction_D = direction_D * direction_D[direction_D.abs().argmax()].sign()  # eigenvectors have no sign of their own
    return direction_D.float(), float(direction_D @ mean_D)


def _wide(router: RouterLayer) -> tuple[Tensor, Tensor | None]:
    assert router.weight is not None
    return router.weight.detach().float(), None if router.bias is None else router.bias.detach().float()


def _seen(router: RouterLayer, logits_TE: Tensor) -> RouterInput:
    if router.config.batch_norm:
        var_E, mean_E = torch.var_mean(logits_TE, dim=0, correction=0)
        normalized_TE = (logits_TE - mean_E) * torch.rsqrt(var_E + BATCH_NORM_EPSILON)
        logits_TE = torch.where(logits_TE == CLOSED, logits_TE, normalized_TE)
    return RouterInput(logits_TE, selection_bias_E=router.selection_bias)


def _choices(router: RouterLayer, logits_TE: Tensor) -> Tensor:
    return router.choose(_seen(router, logits_TE), router.config).expert_ids_TM


def _mass(router: RouterLayer, logits_TE: Tensor, experts: tuple[int, ...]) -> float:
    """The mean over tokens of these experts' scores, as shares of all scores."""
    scores_TE = router.choose(_seen(router, logits_TE), router.config).scores_TE.double()
    shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-300)
    return float(shares_TE[:, list(experts)].sum(-1).mean())


def _bisect(rises: Callable[[float], float], wanted: float) -> float:
    """The shift at which a rising function has the wanted value, as near as its range allows."""
    low, high = LOWEST, HIGHEST
    if rises(low) == rises(high):
        return 0.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) < wanted else (low, middle)
    return (low + high) / 2
