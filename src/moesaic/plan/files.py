"""In what formats a model's own files hold its weights: from config.json, or tensor by tensor from a GGUF header."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.config import ModelConfig
from moesaic.hub.checkpoint import CONFIG, read_json
from moesaic.hub.quantization import read_quantization
from moesaic.hub.resolve import locate
from moesaic.plan.formats import Formats, as_released, named
from moesaic.tensor_spec import ROLES, Role


def formats_of_files(model: str | os.PathLike[str], config: ModelConfig, cache: str = "bf16") -> Formats:
    """Of a preset: as it was released. Of files: as they are.

    Raises CheckpointError for what cannot be read, ConfigError for a packing that is not known.
    """
    place = locate(model)
    if place.kind == "gguf":
        return _of_gguf(place.path, config, cache)
    if place.kind == "preset":
        return named(as_released(config.family), cache)
    path = place.path / CONFIG if place.kind == "folder" else place.path
    return named(_stated(read_json(path)), cache)


def _stated(raw: Mapping[str, Any]) -> str:
    """What a config.json says of its weights: how they are packed, else their dtype."""
    quantization = read_quantization(dict(raw))
    if quantization is None:
        return "fp32" if (raw.get("dtype") or raw.get("torch_dtype")) == "float32" else "bf16"
    if quantization.method == "compressed-tensors":
        group = quantization.groups[0]
        return "int8" if group.bits == 8 else "int4" if group.group == 32 else "int4-128"
    if quantization.method == "fp8":
        return "fp8,experts=mxfp4" if quantization.experts == "fp4" else "fp8"
    return "mxfp4"


def _of_gguf(path: Path, config: ModelConfig, cache: str) -> Formats:
    """The mean bits of each role's matrices, as many different kinds as a file may have."""
    from moesaic.hub.gguf import GgufFile  # the optional package is asked for only here

    file = GgufFile(path)
    weight_map, sizes = file.weight_map(), file.stored_bytes
    held: dict[Role, float] = dict.fromkeys(ROLES, 0.0)
    numbers: dict[Role, float] = dict.fromkeys(ROLES, 0.0)
    for spec in config.tensors():
        if len(spec.shape) > 1 and spec.is_parameter:
            held[spec.role] += sum(sizes[piece.name] for piece in weight_map[spec.name])
            numbers[spec.role] += spec.numel
    bits = {role: 8 * held[role] / numbers[role] for role in ROLES if numbers[role]}
    like = {role: _nearest(each) for role, each in bits.items()}
    return Formats(name="as in the file", by_role=dict.fromkeys(ROLES, "bf16") | like, cache=cache, bits=bits)


def _nearest(bits: float) -> str:
    """What products of such weights are made of follows from the packing that has as many bits."""
    return "fp32" if bits > 24 else "bf16" if bits > 12 else "int8" if bits > 7 else "int6" if bits > 5.5 else "int4"
