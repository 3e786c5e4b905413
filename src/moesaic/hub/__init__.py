"""Models on disk: local folders in the Hugging Face layout, GGUF files, presets. Names resolve late, without torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.hub.loading import load
    from moesaic.hub.resolve import read_config
    from moesaic.hub.saving import save

__all__ = ["load", "read_config", "save"]

_HOMES = {"load": "moesaic.hub.loading", "read_config": "moesaic.hub.resolve", "save": "moesaic.hub.saving"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
