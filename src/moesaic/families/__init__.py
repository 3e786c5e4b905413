"""The families of models that can be read and written: one module each, found by its Hugging Face `model_type`.

A family is data and three functions (see `Family`); modules whose name begins with "_" are shared helpers.
"""

import importlib
import pkgutil
from functools import cache
from typing import Any, Protocol

from moesaic.config import ModelConfig
from moesaic.errors import ConfigError
from moesaic.families._common import Preset
from moesaic.models.weight_map import WeightMap
from moesaic.registry import unknown_name


class Family(Protocol):
    """What a module in this folder offers."""

    PRESETS: dict[str, Preset]

    @staticmethod
    def from_hf(raw: dict[str, Any]) -> ModelConfig:
        """A config.json as our description. Raises ConfigError for what we cannot express."""
        ...

    @staticmethod
    def to_hf(config: ModelConfig) -> dict[str, Any]:
        """The inverse. Raises ConfigError for a model that this family has no fields for."""
        ...

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Our tensors and the names they have in this family's files."""
        ...


@cache
def names() -> tuple[str, ...]:
    """Every family, in alphabetical order."""
    return tuple(sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_")))


def family(name: str) -> Family:
    """The family of this `model_type`. Raises ConfigError that lists the known ones."""
    if name not in names():
        raise unknown_name("model_type", name, list(names()))
    return importlib.import_module(f"{__name__}.{name}")  # pyright: ignore[reportReturnType]


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A Hugging Face config.json as our description, by the family it names."""
    name = raw.get("model_type")
    if not isinstance(name, str):
        raise ConfigError(f"no model_type in the configuration; known: {', '.join(names())}")
    return family(name).from_hf(raw)


def presets() -> dict[str, Preset]:
    """Every preset of every family, by name."""
    return {name: preset for each in names() for name, preset in family(each).PRESETS.items()}


def find_preset(name: str) -> ModelConfig:
    """The description behind a preset's name. Raises ConfigError that lists the known ones."""
    known = presets()
    if name not in known:
        raise unknown_name("preset", name, sorted(known))
    return from_hf(known[name].config)
