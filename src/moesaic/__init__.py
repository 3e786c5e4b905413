"""The whole life of mixture-of-experts language models. Public names resolve late: importing this loads no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.config import ModelConfig
    from moesaic.engine.engine import Engine
    from moesaic.engine.generate import generate
    from moesaic.errors import MoesaicError
    from moesaic.hub.loading import load
    from moesaic.hub.saving import save
    from moesaic.models.decoder import route
    from moesaic.placement import place_experts
    from moesaic.plan.plan import make_plan
    from moesaic.train.lint.suite import lint

__all__ = [
    "Engine",
    "ModelConfig",
    "MoesaicError",
    "__version__",
    "generate",
    "lint",
    "load",
    "make_plan",
    "place_experts",
    "route",
    "save",
]

__version__ = "0.1.0"

_HOMES = {
    "Engine": "moesaic.engine.engine",
    "ModelConfig": "moesaic.config",
    "MoesaicError": "moesaic.errors",
    "generate": "moesaic.engine.generate",
    "lint": "moesaic.train.lint.suite",
    "load": "moesaic.hub.loading",
    "make_plan": "moesaic.plan.plan",
    "place_experts": "moesaic.placement",
    "route": "moesaic.models.decoder",
    "save": "moesaic.hub.saving",
}
# Rooms below the hub that make presets with weights enter them in its registry when they are imported.
_BRINGS = {"load": ("moesaic.tune.upcycle",), "Engine": ("moesaic.tune.upcycle",)}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in _BRINGS.get(name, ()):
        import_module(module)
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
