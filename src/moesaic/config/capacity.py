"""How many tokens an expert takes while training, and where the others go, as data. No torch here.

T tokens, E experts, K choices a token, C slots.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from moesaic.checks import require, require_positive
from moesaic.config.router import ROUTER_KINDS, RouterConfig

Rounding = Literal["ceil", "floor", "round"]
DropOrder = Literal["position", "probability", "batch_prioritized"]
Overflow = Literal["residual", "next_best", "shared"]

_ROUNDINGS: dict[str, Callable[[Fraction], int]] = {"ceil": math.ceil, "floor": math.floor, "round": round}

_MOST = 10**9  # so that slots, and their sum over groups, are whole numbers of 64 bits

NO_NEXT_BEST = {
    "hash": "looks its experts up and ranks none",
    "sparsemixer": "weighs each choice by a gradient of its own",
    "relu": "gives the experts it did not choose a weight of 0",
}
"""Routers without a next-best expert, and why."""


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """A limit to the rows of an expert (GShard, arXiv:2006.16668, alg. 1; Switch, arXiv:2101.03961, eq. 3).

    It holds where MoeConfig says so: while training, in evaluation, or both.

    factor, rounding, minimum, multiple_of: C, see `slots`. "round" takes halves to the even number. In place of the
    factor may stand `fixed`, C itself, or `token_share`, C as a share of the tokens: one of the three.
    drop: who claims slots first. "position": all first choices in the order of tokens, then all second ones (GShard).
    "probability": the larger router weight, among equals the earlier choice, then token (DeepSeek-V2,
    arXiv:2405.04434, sec. 2.2.4). "batch_prioritized": first choices before second ones, and among these the token
    with the larger best score (V-MoE, arXiv:2106.05974, sec. 4.1).
    overflow: what becomes of a row without a slot. "residual": it is gone, and the residual stream carries its token.
    "next_best": it moves to its token's best other expert that has room, weighted by that expert's score over the
    same sum; where there is none it is gone. "shared": the token's shared expert counts that much more. The rows that
    stay keep their weights, unless `renormalize` divides these by their token's sum (fairseq, with
    `moe_normalize_gate_prob_before_dropping` false).
    group_size: so many consecutive tokens share a budget, padding left out; None: all tokens of a forward pass on this
    rank. The last group is shorter. With groups that do not straddle ranks, their number changes nothing.
    "document": each document has a budget of its own; a row is one where it does not hold several.
    per: a budget for each expert, or for each group of the router, that is for each device (DeepSeek-V2).
    pad: experts compute exactly C rows each, zeros in the empty slots, so that shapes do not change from step to step.

    Raises ConfigError for impossible settings.
    """

    factor: float | None = None
    fixed: int | None = None
    token_share: float | None = None
    minimum: int = 0
    rounding: Rounding = "ceil"
    multiple_of: int = 1
    drop: DropOrder = "position"
    overflow: Overflow = "residual"
    renormalize: bool = False
    group_size: int | Literal["document"] | None = None
    per: Literal["expert", "device"] = "expert"
    pad: bool = False

    def __post_init__(self) -> None:
        self._check_size()
        require(
            isinstance(self.minimum, int) and not isinstance(self.minimum, bool) and self.minimum >= 0,
            f"capacity minimum={self.minimum!r}; it must be a whole number, 0 or more",
        )
        by_number = self.group_size is not None and self.group_size != "document"
        require_positive(self, "multiple_of", *(["group_size"] if by_number else []))
        for name in ("factor", "fixed", "minimum", "multiple_of"):
            value = getattr(self, name) or 0
            require(value <= _MOST, f"capacity {name}={value:.3g}; use {_MOST:,} at most")
        _require_known("rounding", self.rounding, get_args(Rounding))
        _require_known("drop", self.drop, get_args(DropOrder))
        _require_known("overflow", self.overflow, get_args(Overflow))
        _require_known("per", self.per, ("expert", "device"))
        require(
            not self.renormalize or self.overflow == "residual",
            f'capacity renormalize=true with overflow="{self.overflow}", which weighs what it moves; leave one out',
        )
        require(
            not (self.pad and self.per == "device"),
            'capacity pad=true with per="device": there an expert has no number of slots of its own; use per="expert"',
        )

    def _check_size(self) -> None:
        """Of factor, fixed and token_share one is given, in its range."""
        given = [name for name in ("factor", "fixed", "token_share") if getattr(self, name) is not None]
        require(len(given) == 1, f"capacity of {' and '.join(given) or 'no size'}; give factor, fixed or token_share")
        name, value = given[0], getattr(self, given[0])
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        why = "it must be above 0 and finite (without a capacity nothing is dropped)"
        require(is_number, f"capacity {name}={value!r}; {why}")
        if name == "fixed":
            require_positive(self, "fixed")

    def slots(self, num_tokens: int, router: RouterConfig) -> int:
        """C of each expert (or device) in a group of `num_tokens` tokens that count; padding does not.

        rounding(factor * K * T / E), rounding(token_share * T), or what is fixed; at least `minimum`, then up to a
        multiple of `multiple_of`; per device, E is the number of devices. Factor and share are taken as the decimals
        they are written as, so that 1.1 * 20 tokens are 22. Routers whose tokens differ in their number of experts
        count as if all had K.
        """
        if self.token_share is not None:
            wanted = Fraction(str(self.token_share)) * num_tokens
        elif self.fixed is not None:
            wanted = Fraction(self.fixed)
        else:
            wanted = Fraction(str(self.factor)) * Fraction(router.top_k * num_tokens, self.num_budgets(router))
        slots = max(self.minimum, _ROUNDINGS[self.rounding](wanted))
        return math.ceil(Fraction(slots, self.multiple_of)) * self.multiple_of

    def num_budgets(self, router: RouterConfig) -> int:
        """How many budgets a group of tokens has: one an expert, or one a device."""
        return router.num_experts if self.per == "expert" or router.groups is None else router.groups.num_groups


def refusal(router: RouterConfig, capacity: CapacityConfig, *, has_shared: bool = True) -> str | None:
    """Why this router cannot have this capacity, and what would work, in one line; None when it can.

    has_shared: whether the layer has shared experts.
    """
    if not router.kind.takes_capacity:
        return _refused("capacity", router, "decides the experts' loads itself", lambda name: _takes_capacity(name))
    if capacity.per == "device" and router.groups is None:
        return 'capacity per="device" with a router without groups; give it groups, one a device, or use per="expert"'
    if capacity.overflow == "next_best" and router.name in NO_NEXT_BEST:
        why = f'{NO_NEXT_BEST[router.name]} (overflow="residual" works)'
        return _refused(
            'overflow="next_best"', router, why, lambda name: _takes_capacity(name) and name not in NO_NEXT_BEST
        )
    if capacity.overflow == "shared" and not has_shared:
        return (
            'capacity overflow="shared" without a shared expert; add one (`shared`), or use "residual" or "next_best"'
        )
    return None


def expected_drop(mean_rows: float, slots: int) -> float:
    """The share of rows that find no slot when loads are Poisson: E[(N - C)+] / mean, N being an expert's rows.

    mean_rows: K T / E for an even router. 0 without rows. This is what luck alone drops: a router drops more.
    """
    if mean_rows <= 0:
        return 0.0
    # E[(N - C)+] = mean - C + E[(C - N)+]; of the two sums the one over the tail, so that nothing cancels.
    if slots >= mean_rows:
        return _tail(mean_rows, slots, 1) / mean_rows
    return (mean_rows - slots + _tail(mean_rows, slots, -1)) / mean_rows


def _tail(mean: float, start: int, step: int) -> float:
    """sum over i >= 1 of i * P(N = start + i * step), N Poisson."""
    total, count = 0.0, 0
    while start + (count + 1) * step >= 0:
        count += 1
        number = start + count * step
        term = count * math.exp(number * math.log(mean) - mean - math.lgamma(number + 1))
        total += term
        # Beyond the first terms each is smaller than the one before by a falling factor.
        if term <= 1e-18 * total and count > 1 + math.sqrt(mean):
            break
    return total


def _takes_capacity(name: str) -> bool:
    return ROUTER_KINDS[name].takes_capacity


def _refused(what: str, router: RouterConfig, why: str, fits: Callable[[str], bool]) -> str:
    fitting = ", ".join(name for name in ROUTER_KINDS if fits(name))
    return f"{what} with router {router.name!r}, which {why}; leave it out or use one of: {fitting}"


def _require_known(field: str, value: str, known: tuple[str, ...]) -> None:
    require(value in known, f"capacity {field}={value!r}; known: {', '.join(known)}")
