"""Which routers, balance losses and capacities go together, and why the others do not: what docs/routing.md tabulates.

Nothing is decided here. Every reason is what the part itself says when a configuration asks for it.
"""

from dataclasses import replace
from typing import Any

from moesaic.config.capacity import CapacityConfig
from moesaic.config.capacity import refusal as capacity_refusal
from moesaic.config.router import ROUTER_KINDS, GroupConfig, HashSettings, NullSettings, RouterConfig, RouterSettings
from moesaic.errors import ConfigError
from moesaic.routing.balancers import BALANCE_LOSSES

NUM_EXPERTS, TOP_K, VOCAB_SIZE = 8, 2, 64
GROUPS = GroupConfig(num_groups=4, top_groups=2)

_NEEDED: dict[str, RouterSettings] = {
    "hash": HashSettings(vocab_size=VOCAB_SIZE),
    "null_topk": NullSettings(num_null_experts=2),
}
_LEARNED_HASH = HashSettings(vocab_size=VOCAB_SIZE, weight="softmax")

OPTIONS: dict[str, dict[str, Any]] = {
    "selection_bias": {"selection_bias": True},
    "groups": {"groups": GROUPS},
    "jitter": {"jitter": 0.01},
    "batch_norm": {"batch_norm": True},
    "gating_dropout": {"gating_dropout": 0.1},
}
"""What any router may be asked for."""

CAPACITIES: dict[str, CapacityConfig] = {
    'drop="position"': CapacityConfig(factor=1.0),
    'drop="probability"': CapacityConfig(factor=1.0, drop="probability"),
    'drop="batch_prioritized"': CapacityConfig(factor=1.0, drop="batch_prioritized"),
    'overflow="next_best"': CapacityConfig(factor=1.0, overflow="next_best"),
    'overflow="shared"': CapacityConfig(factor=1.0, overflow="shared"),
    "fixed": CapacityConfig(fixed=3),
    "token_share": CapacityConfig(token_share=0.3),
    "renormalize": CapacityConfig(factor=1.0, renormalize=True),
    "group_size": CapacityConfig(factor=1.0, group_size=8),
    'group_size="document"': CapacityConfig(factor=1.0, group_size="document"),
    'per="device"': CapacityConfig(factor=1.0, per="device"),
    "pad": CapacityConfig(factor=1.0, pad=True),
}
"""One of each mode."""


def example(name: str, **options: Any) -> RouterConfig:
    """A small router of this name. Raises ConfigError for options that it cannot have."""
    top_k = NUM_EXPERTS if name == "dense" else ROUTER_KINDS[name].top_k or TOP_K
    return RouterConfig(name=name, num_experts=NUM_EXPERTS, top_k=top_k, **{"settings": _NEEDED.get(name), **options})


def examples() -> dict[str, RouterConfig]:
    """Every router; those that can have groups with them, too, and hashing with learned weights."""
    routers = {name: example(name) for name in ROUTER_KINDS}
    routers['hash, weight="softmax"'] = replace(routers["hash"], settings=_LEARNED_HASH)
    grouped = [name for name in ROUTER_KINDS if option_refusal(name, "groups") is None]
    return routers | {f"{name}, groups": example(name, groups=GROUPS) for name in grouped}


def option_refusal(name: str, option: str) -> str | None:
    """Why the router of this name cannot have one of OPTIONS; None when it can."""
    try:
        example(name, **OPTIONS[option])
    except ConfigError as error:
        return str(error)
    return None


def loss_refusal(router: RouterConfig, loss: str) -> str | None:
    """Why this balance loss cannot be used with this router; None when it can."""
    why = BALANCE_LOSSES[loss].refusal(router)
    return None if why is None else f'the balance loss "{loss}" with router "{router.name}", {why}'


def mode_refusal(router: RouterConfig, mode: str, *, has_shared: bool = True) -> str | None:
    """Why this router cannot have one of CAPACITIES; None when it can."""
    return capacity_refusal(router, CAPACITIES[mode], has_shared=has_shared)
