"""What a balance loss is, the list of them, and which routers they fit.

T tokens, E experts. A loss is of one layer: returned as a scalar, never collected anywhere, averaged over layers, never
pooled. Padding never counts: it has no rows, and masks leave it out of the means.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic.config.router import RouterConfig
from moesaic.errors import ConfigError
from moesaic.registry import Registry
from moesaic.routing.balancers.counting import choice_counts
from moesaic.routing.routing import RoutingDecision

Scope = Literal["token", "document", "micro-batch", "running", "step", "weights"]
Refusal = Callable[[RouterConfig], str | None]


@dataclass(frozen=True, kw_only=True)
class BalanceLoss:
    """One layer's routing in, one scalar out, with its gradient.

    equation: takes the decision; of scope "running" and "step" also how often each expert was chosen there.
    scope: over what its load is counted. "token" and "document": the loss is a mean over tokens, so that cutting a
    step into micro-batches changes nothing. "micro-batch": each has its own loss, and their mean, weighted by tokens,
    is minimised. "running": choices over all ranks and the step's micro-batches so far; "step": over all of them.
    "weights": it looks at the router alone.
    evens: it is reported so that 1.0 is perfect balance, whatever K; others are reported as their equation has them.
    refusals: what it cannot be computed from. own_coefficient: each layer's is multiplied by a coefficient that the
    router keeps (`penalty_coefficient`).
    """

    name: str
    equation: Callable[..., Tensor]
    scope: Scope
    evens: bool
    refusals: tuple[Refusal, ...]
    own_coefficient: bool = False

    def of(self, decision: RoutingDecision, counts_E: Tensor | None = None) -> Tensor:
        """The loss of one layer. counts_E: of the loss's scope; None where this batch is all there is."""
        if self.scope in ("running", "step"):
            return self.equation(decision, choice_counts(decision) if counts_E is None else counts_E)
        return self.equation(decision)

    def refusal(self, router: RouterConfig) -> str | None:
        """Why it cannot be used with this router, and what could; None when it can."""
        return next((why for refusal in self.refusals if (why := refusal(router)) is not None), None)


BALANCE_LOSSES: Registry[BalanceLoss] = Registry("balance loss")


def balance_loss(
    name: str, *, scope: Scope, evens: bool = False, refusals: Sequence[Refusal] = (), own_coefficient: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorate an equation to make it a balance loss. One equation may have several names, with different scopes."""

    def enter(equation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        entry = BalanceLoss(
            name=name,
            equation=equation,
            scope=scope,
            evens=evens,
            refusals=tuple(refusals),
            own_coefficient=own_coefficient,
        )
        BALANCE_LOSSES.register(name)(entry)
        return equation

    return enter


def mean_over_layers(name: str, decisions: Iterable[RoutingDecision]) -> Tensor:
    """The named loss of each layer, averaged over layers.

    Never pooled: counts summed over layers hide layers that collapsed onto different experts. Raises ConfigError when
    no layer routes.
    """
    decisions = list(decisions)
    if not decisions:
        raise ConfigError(f'the balance loss "{name}" of no layers; a dense model has none')
    return torch.stack([BALANCE_LOSSES[name].of(decision) for decision in decisions]).mean()


def refuse_unfit(names: Iterable[str], routers: Sequence[RouterConfig]) -> None:
    """Raise ConfigError for a balance loss that a model with these routers cannot have, with what would work.

    Layers whose router shares tokens out by itself (such as hashing in the first layers) go without the loss, as long
    as any other layer takes it.
    """
    for name in names:
        loss = BALANCE_LOSSES[name]
        found = [(router, why) for router in routers if (why := loss.refusal(router)) is not None]
        for router, why in found:
            if router.kind.balanceable or len(found) == len(routers):
                raise ConfigError(f'the balance loss "{name}" with router "{router.name}", {why}')
