"""From what a user types to a model: a folder, a config.json, a GGUF file, or the name of a preset. No torch here."""

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moesaic import families
from moesaic.config import ModelConfig, OutlinedModel
from moesaic.errors import CheckpointError, ConfigError
from moesaic.families import _counted, _multimodal, _native, _usual
from moesaic.hub import checkpoint
from moesaic.hub.embedded import embedded_gguf
from moesaic.hub.gguf_header import read_gguf_headers
from moesaic.hub.gguf_outline import outline_of_header
from moesaic.hub.quantization import FIELD
from moesaic.registry import Registry, unknown_name

PRESET_WEIGHTS: Registry[Callable[[], Path]] = Registry("preset with weights")
"""Presets whose weights this machine can have: name -> a function that finds or makes their folder or file."""

PRESET_WEIGHTS.register("smollm2-135m-instruct")(embedded_gguf)


class Place(NamedTuple):
    """Where a model is: `name` is a preset's."""

    kind: Literal["folder", "config", "gguf", "preset"]
    path: Path
    name: str = ""


def locate(path_or_preset: str | os.PathLike[str]) -> Place:
    """What the user means. Paths go before presets. Raises CheckpointError when it is neither."""
    path = Path(path_or_preset).expanduser()
    if path.is_dir():
        return Place("folder", path)
    if path.is_file() and path.suffix == ".gguf":
        return Place("gguf", path)
    if path.is_file() and path.suffix == ".json":
        return Place("config", path)
    if path.exists():
        raise CheckpointError(f"{path} is no model; give a folder with a config.json, a .gguf file or a preset")
    name = os.fspath(path_or_preset)
    if name in families.presets():
        return Place("preset", path, name)
    raise _nowhere(name)


def _nowhere(name: str) -> CheckpointError:
    if name in _counted.PRESETS:
        return CheckpointError(f"{name!r} is {_counted.NOT_YET}; `moesaic count` and `plan` take it")
    presets = sorted(families.presets())
    near = difflib.get_close_matches(Path(name).name.lower(), presets, n=3, cutoff=0.5)
    hint = f"; nearest presets: {', '.join(near)}" if near else "; `moesaic count --all` lists the presets"
    return CheckpointError(f"{name!r} is no path on this machine and no preset (nothing is downloaded){hint}")


def read_config(path_or_preset: str | os.PathLike[str]) -> ModelConfig:
    """The description of a model, without its weights and without torch.

    Takes a folder, a config.json, a .gguf file or a preset's name; says on stderr which parts it leaves out of a model
    for more than text. Raises CheckpointError or ConfigError.
    """
    place = locate(path_or_preset)
    if place.kind == "preset":
        return families.find_preset(place.name)
    if place.kind == "folder":
        config = checkpoint.read_folder_config(place.path)
        checkpoint.tell_left_out(place.path / checkpoint.CONFIG)
        return config
    if place.kind == "config":
        config = checkpoint.read_config_file(place.path)
        checkpoint.tell_left_out(place.path)
        return config
    from moesaic.hub.gguf import GgufFile  # the optional package is asked for only here

    return GgufFile(place.path).config


def describe_config(path_or_preset: str | os.PathLike[str]) -> ModelConfig:
    """Like `read_config`, and of models that do not run yet: what counts and plans need is known of more of them.

    How weights are packed, and what they are called, changes no count: files are described that cannot be read. Of a
    .gguf file the header is enough.
    """
    path = Path(path_or_preset).expanduser()
    if os.fspath(path_or_preset) in _counted.PRESETS and not path.exists():
        return _counted.count(_counted.PRESETS[os.fspath(path_or_preset)].config)
    if path.is_file() and path.suffix == ".gguf":
        return _describe_gguf(path)
    path = path / checkpoint.CONFIG if path.is_dir() else path
    if path.suffix != ".json" or not path.is_file():
        return read_config(path_or_preset)
    raw = checkpoint.read_json(path)
    try:
        config = _described({name: value for name, value in raw.items() if name != FIELD})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    checkpoint.tell_left_out(path)
    return _told(config, path)


def _describe_gguf(path: Path) -> ModelConfig:
    from moesaic.hub.gguf import ARCHITECTURES, config_of_header

    header = read_gguf_headers(path)
    name = header.metadata.get("general.architecture")
    if name in ARCHITECTURES or not isinstance(name, str):
        return config_of_header(header, path)
    try:
        return _told(outline_of_header(header, name), path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _told(config: ModelConfig, path: Path) -> ModelConfig:
    """The same, after what was taken for granted of it was said on stderr."""
    if isinstance(config, OutlinedModel) and config.assumed:
        print(f"moesaic: {path}: {config.assumed}", file=sys.stderr)
    return config


def _described(raw: dict[str, Any]) -> ModelConfig:
    raw = _native.from_native(raw) if _native.is_native(raw) else _multimodal.as_text(raw)
    if _counted.knows(raw):
        return _counted.count(raw)
    if _multimodal.has_text_part(raw) and not families.knows(raw.get("model_type")):
        raw = _multimodal.text_part(raw)
    family = raw.get("model_type")
    if isinstance(family, str) and not families.knows(family):
        known = sorted({*families.names(), *_counted.ARCHITECTURES})
        return _usual.guessed(raw, unknown_name("model_type", family, known))
    return families.from_hf({name: value for name, value in raw.items() if name != FIELD})


def weights_place(path_or_preset: str | os.PathLike[str]) -> Place:
    """Like `locate`, down to a folder or a file with weights. Raises CheckpointError when there are none."""
    place = locate(path_or_preset)
    if place.kind == "config":
        raise CheckpointError(f"{place.path} holds no weights; give the folder {place.path.parent}")
    if place.kind != "preset":
        return place
    if place.name not in PRESET_WEIGHTS:
        raise CheckpointError(
            f"preset {place.name!r} is a configuration without weights; download them and give their folder, "
            f"or use a preset that brings them: {', '.join(sorted(PRESET_WEIGHTS))}"
        )
    return locate(PRESET_WEIGHTS[place.name]())
