"""In what formats a model's own files hold its weights: from config.json, or tensor by tensor from a GGUF header."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from moesaic.config import ModelConfig, OutlinedModel
from moesaic.errors import CheckpointError
from moesaic.families import _counted, _native
from moesaic.hub.checkpoint import CONFIG, read_json
from moesaic.hub.gguf import names_in_gguf
from moesaic.hub.gguf_header import GgufTensor, read_gguf_headers
from moesaic.hub.gguf_outline import role_of
from moesaic.hub.resolve import locate
from moesaic.plan.formats import Formats, as_released, named
from moesaic.plan.stated import stated_formats
from moesaic.tensor_spec import ROLES, Role


def formats_of_files(model: str | os.PathLike[str], config: ModelConfig, cache: str = "bf16") -> Formats:
    """Of a preset: as it was released. Of files: as they are.

    Raises CheckpointError for what cannot be read, ConfigError for a packing that is not known.
    """
    if os.fspath(model) in _counted.PRESETS and not Path(model).exists():
        return named(as_released(config.family), cache)
    place = locate(model)
    if place.kind == "gguf":
        return _of_gguf(place.path, config, cache)
    if place.kind == "preset":
        return named(as_released(config.family), cache)
    path = place.path / CONFIG if place.kind == "folder" else place.path
    raw = read_json(path)
    return stated_formats(_native.from_native(raw) if _native.is_native(raw) else raw, cache)


def _of_gguf(path: Path, config: ModelConfig, cache: str) -> Formats:
    """The mean bits of each role's matrices, as many different kinds as a file may have."""
    held: dict[Role, float] = dict.fromkeys(ROLES, 0.0)
    numbers: dict[Role, float] = dict.fromkeys(ROLES, 0.0)
    for role, tensor in _matrices(path, config):
        held[role] += tensor.num_bytes
        numbers[role] += math.prod(tensor.shape)
    bits: dict[Role, float] = {role: 8 * held[role] / numbers[role] for role in ROLES if numbers[role]}
    like: dict[Role, str] = {role: _nearest(bits[role]) if role in bits else "bf16" for role in ROLES}
    return Formats(name="as in the file", by_role=like, cache=cache, bits=bits)


def _matrices(path: Path, config: ModelConfig) -> Iterator[tuple[Role, GgufTensor]]:
    held_in_file = read_gguf_headers(path).tensors
    if isinstance(config, OutlinedModel):
        for name, tensor in held_in_file.items():
            if len(tensor.shape) > 1 and "bias" not in name:
                yield role_of(name), tensor
        return
    weight_map = names_in_gguf(config)
    for spec in config.tensors():
        if len(spec.shape) > 1 and spec.is_parameter:
            names = [piece.name for piece in weight_map[spec.name]]
            if absent := [name for name in names if name not in held_in_file]:
                raise CheckpointError(f"{path} has no tensor {absent[0]}; copy or download it again")
            for name in names:
                yield spec.role, held_in_file[name]


def _nearest(bits: float) -> str:
    """What products of such weights are made of follows from the packing that has as many bits."""
    return "fp32" if bits > 24 else "bf16" if bits > 12 else "int8" if bits > 7 else "int6" if bits > 5.5 else "int4"
