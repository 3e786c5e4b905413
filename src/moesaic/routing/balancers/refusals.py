"""Which routers a balance loss cannot be used with, and what would work instead. No torch here."""

from moesaic.config.router import RouterConfig


def fixed_load(router: RouterConfig) -> str | None:
    """Losses cannot move the load of a router that shares tokens out by itself."""
    if router.kind.balanceable:
        return None
    return "whose load no loss can move; leave it out (train.balance_losses=[] for none)"


def no_noise(router: RouterConfig) -> str | None:
    """The smooth load is the chance that noise moves a choice."""
    if router.name != "noisy_topk":
        return 'which ranks without noise; use router "noisy_topk", or the balance loss "importance"'
    if router.top_k == router.num_experts:
        return 'whose top_k is num_experts, so that noise moves nothing; lower top_k or use "importance"'
    return None


def varying_k(router: RouterConfig) -> str | None:
    """A document's shares are counted among K best experts a token."""
    if router.kind.fixed_top_k:
        return None
    return 'which has no fixed number of experts a token; use "switch" or "global_exact"'


def no_groups(router: RouterConfig) -> str | None:
    """Devices are groups of experts."""
    return None if router.groups is not None else 'whose experts are in no groups; give it groups, or use "switch"'


def no_weight(router: RouterConfig) -> str | None:
    """There is nothing to learn in a router without weights."""
    return None if router.has_weight else "which has no weights; leave it out, or give its weights a score"


def no_penalty(router: RouterConfig) -> str | None:
    """The penalty adapts to how many experts a ReLU leaves active."""
    if router.name == "relu":
        return None
    return 'whose number of experts no ReLU decides; use router "relu", or leave it out'
