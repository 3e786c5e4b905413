"""The families of models that can be read and written: one module each, found by its Hugging Face `model_type`.

A family is data and three functions (see `Family`); modules whose name begins with "_" are shared helpers.
"""

import dataclasses
import importlib
import pkgutil
import re
from functools import cache, reduce
from typing import Any, Literal, Protocol

from moesaic.config import ModelConfig
from moesaic.errors import ConfigError
from moesaic.families import _counted, _multimodal
from moesaic.families._common import Preset, refusal
from moesaic.models.weight_map import WeightMap
from moesaic.registry import unknown_name


class Family(Protocol):
    """What a module in this folder offers; `ALIASES`, where it has them, are further `model_type`s that it reads.

    Families that also come as a part of models for images and text say what begins the names of this part in their
    files, `TEXT_PREFIX`, and those of the other parts, `LEFT_OUT`; so do others whose files hold what we leave out.
    `RENAMED`: how names that other programs give the tensors become those of the released files, as patterns of `re`
    and what replaces them, one after the other. `PACKED_AS`: how its packed weights are stored (see hub/quantization).
    """

    PRESETS: dict[str, Preset]

    @staticmethod
    def from_hf(raw: dict[str, Any]) -> ModelConfig:
        """A config.json as our description. Raises ConfigError for what we cannot express."""
        ...

    @staticmethod
    def to_hf(config: ModelConfig) -> dict[str, Any]:
        """The inverse, of what this family has fields for; `families.to_hf` refuses a model that would change."""
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
    """The family of this `model_type`, or of an alias of it. Raises ConfigError that lists the known ones."""
    if name not in names():
        if name in _counted.ARCHITECTURES:
            raise ConfigError(
                f"model_type {name!r} is {_counted.NOT_YET}; `moesaic count` and `moesaic plan` take its config.json"
            )
        if name not in _aliases():
            raise unknown_name("model_type", name, list(names()))
        name = _aliases()[name]
    return importlib.import_module(f"{__name__}.{name}")  # pyright: ignore[reportReturnType]


def knows(name: Any) -> bool:
    """Whether models of this `model_type` can be read."""
    return isinstance(name, str) and (name in names() or name in _aliases())


def text_names(name: str) -> tuple[str, tuple[str, ...]]:
    """`TEXT_PREFIX` and `LEFT_OUT` of a family; nothing for those that come alone."""
    return getattr(family(name), "TEXT_PREFIX", ""), getattr(family(name), "LEFT_OUT", ())


def released_name(name: str, tensor: str) -> str:
    """What a tensor of a family's files is called in the released ones, by the family's `RENAMED`."""
    rules: tuple[tuple[str, str], ...] = getattr(family(name), "RENAMED", ())
    return reduce(lambda spelled, rule: re.sub(*rule, spelled), rules, tensor)


def packed_as(name: str) -> Literal["scale_inv", "scale"]:
    """`PACKED_AS` of a family; as DeepSeek-V3's where it says nothing."""
    return getattr(family(name), "PACKED_AS", "scale_inv")


@cache
def _aliases() -> dict[str, str]:
    """Other names of families, for models that are one of theirs under a name of their own (`ALIASES`)."""
    return {alias: name for name in names() for alias in getattr(family(name), "ALIASES", ())}


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A Hugging Face config.json as our description, by the family it names."""
    name = raw.get("model_type")
    if not isinstance(name, str):
        raise ConfigError(f"no model_type in the configuration; known: {', '.join(names())}")
    if not knows(name) and _multimodal.has_text_part(raw):
        raise _unknown_parts(name, raw[_multimodal.TEXT].get("model_type"))
    return family(name).from_hf(raw)


def _unknown_parts(name: str, text: Any) -> ConfigError:
    """The error for a model of several parts under a name that no family has, by what its text part is."""
    whole = f"model_type {name!r} has a text part (text_config) of model_type {text!r}, "
    if isinstance(text, str) and text in _counted.ARCHITECTURES:
        return ConfigError(
            f"{whole}which is {_counted.NOT_YET}; `moesaic count` and `moesaic plan` take its config.json"
        )
    if not knows(text):
        return ConfigError(f"{whole}and neither is known; known: {', '.join(names())}")
    return ConfigError(
        f"{whole}which is known, but what its tensors are called in these files is not; give a folder with that part's "
        f"fields as config.json and its tensors as {text} names them (`moesaic count` takes it as it is)"
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, by its family.

    Raises ConfigError for a model that the family has no fields for: what is written must read back as the same.
    """
    own = family(config.family)
    described = own.to_hf(config)
    try:
        back = own.from_hf(described)
    except ConfigError as error:  # a value that it writes but has no words for, such as another family's activation
        raise refusal(config.family, str(error)) from error
    if back != config:
        raise refusal(config.family, difference(config, back))
    return described


def difference(config: Any, back: Any, where: str = "") -> str:
    """The first part of two descriptions that differs, in the words of a message."""
    if dataclasses.is_dataclass(config) and type(config) is type(back):
        names = (field.name for field in dataclasses.fields(config))
        name = next(name for name in names if getattr(config, name) != getattr(back, name))
        return difference(getattr(config, name), getattr(back, name), f"{where}.{name}" if where else name)
    if isinstance(config, tuple) and isinstance(back, tuple) and len(config) == len(back):
        index = next(index for index, pair in enumerate(zip(config, back, strict=True)) if pair[0] != pair[1])
        return difference(config[index], back[index], f"{where}[{index}]")
    return f"{where} is {config!r} and would be read back as {back!r}"


def presets() -> dict[str, Preset]:
    """Every preset of every family, by name."""
    return {name: preset for each in names() for name, preset in family(each).PRESETS.items()}


def find_preset(name: str) -> ModelConfig:
    """The description behind a preset's name. Raises ConfigError that lists the known ones."""
    known = presets()
    if name not in known:
        raise unknown_name("preset", name, sorted(known))
    return from_hf(known[name].config)
