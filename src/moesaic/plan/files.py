"""In what formats a model's own files hold its weights: from config.json, or tensor by tensor from a GGUF header."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.config import ModelConfig
from moesaic.errors import CheckpointError, ConfigError
from moesaic.families import _counted
from moesaic.families._multimodal import TEXT, has_text_part
from moesaic.hub.checkpoint import CONFIG, read_json
from moesaic.hub.gguf import names_in_gguf
from moesaic.hub.gguf_header import read_gguf_header
from moesaic.hub.quantization import FIELD, read_quantization
from moesaic.hub.resolve import locate
from moesaic.plan.formats import Formats, as_released, named
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
    return named(_stated(read_json(path)), cache)


def _stated(raw: Mapping[str, Any]) -> str:
    """What a config.json says of its weights, or of those of its text part: how they are packed, else their dtype."""
    if has_text_part(dict(raw)):
        outer = {name: raw[name] for name in (FIELD, "dtype", "torch_dtype") if raw.get(name) is not None}
        return _stated({name: value for name, value in raw[TEXT].items() if value is not None} | outer)
    described = raw.get(FIELD)
    if isinstance(described, dict) and described.get("format") == "mxfp4-pack-quantized":
        return "mxfp4"
    try:
        quantization = read_quantization(dict(raw))
    except ConfigError as error:
        raise ConfigError(f"{error}; say what a plan is to assume: --format, such as int4-128") from error
    if quantization is None:
        return "fp32" if (raw.get("dtype") or raw.get("torch_dtype")) == "float32" else "bf16"
    if quantization.method == "compressed-tensors":
        group = quantization.groups[0]
        packing = "int8" if group.bits == 8 else "int4" if group.group == 32 else "int4-128"
        left = " ".join(map(str, raw[FIELD].get("ignore") or ()))
        return f"bf16,experts={packing}" if "attn" in left else packing  # what is ignored stays as it was
    if quantization.method == "moesaic-uneven4":
        return "uneven4"
    if quantization.method == "fp8":
        return "fp8,experts=mxfp4" if quantization.experts == "fp4" else "fp8"
    return "mxfp4"


def _of_gguf(path: Path, config: ModelConfig, cache: str) -> Formats:
    """The mean bits of each role's matrices, as many different kinds as a file may have."""
    weight_map, held_in_file = names_in_gguf(config), read_gguf_header(path).tensors
    held: dict[Role, float] = dict.fromkeys(ROLES, 0.0)
    numbers: dict[Role, float] = dict.fromkeys(ROLES, 0.0)
    for spec in config.tensors():
        if len(spec.shape) > 1 and spec.is_parameter:
            names = [piece.name for piece in weight_map[spec.name]]
            if absent := [name for name in names if name not in held_in_file]:
                raise CheckpointError(f"{path} has no tensor {absent[0]}; copy or download it again")
            held[spec.role] += sum(held_in_file[name].num_bytes for name in names)
            numbers[spec.role] += spec.numel
    bits: dict[Role, float] = {role: 8 * held[role] / numbers[role] for role in ROLES if numbers[role]}
    like: dict[Role, str] = {role: _nearest(bits[role]) if role in bits else "bf16" for role in ROLES}
    return Formats(name="as in the file", by_role=like, cache=cache, bits=bits)


def _nearest(bits: float) -> str:
    """What products of such weights are made of follows from the packing that has as many bits."""
    return "fp32" if bits > 24 else "bf16" if bits > 12 else "int8" if bits > 7 else "int6" if bits > 5.5 else "int4"
