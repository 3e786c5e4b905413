"""In what formats weights are, by what config.json says of them (`quantization_config` in the words of many programs).

Whether this package can read such files is another matter: bits, and what is left alone, are all that a plan needs.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from moesaic.errors import ConfigError
from moesaic.families._multimodal import TEXT, as_text, has_text_part
from moesaic.fields import shown
from moesaic.hub.quantization import EXPERTS, FIELD
from moesaic.plan.formats import Formats, named
from moesaic.tensor_spec import Role

_LEFT: tuple[tuple[Role, str], ...] = (
    ("attention", r"(?<!linear_)attn"),
    ("shared_experts", r"shared_expert|shared_mlp"),
    ("mlp", r"mlp\\?\.\(|mlp\.(gate_up|gate|up|down)_proj"),
    ("experts", r"(?<!shared_)(?<!shared\.)experts"),
)
"""By what in the names of modules that are left as they were it is told that all matrices of a role were."""
_LISTS = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "exclude", "llm_int8_skip_modules")
_NF4_BITS = {True: 4 + 8 / 64 + 32 / (64 * 256), False: 4 + 32 / 64}
"""QLoRA (arXiv:2305.14314, sec. 3): an fp32 scale for 64 weights; rounded to 8 bits, with one in fp32 for 256."""


class Packed(NamedTuple):
    """The packing whose products are such weights' own, and bits of a weight where they are others."""

    name: str
    bits: float | None = None


def stated_formats(raw: Mapping[str, Any], cache: str = "bf16") -> Formats:
    """Of a config.json, or of its text part. Raises ConfigError for a packing that is not known."""
    raw = as_text(dict(raw))
    if has_text_part(raw):
        outer = {name: raw[name] for name in (FIELD, "dtype", "torch_dtype") if raw.get(name) is not None}
        return stated_formats({name: value for name, value in raw[TEXT].items() if value is not None} | outer, cache)
    described = raw.get(FIELD)
    if not described:
        return named("fp32" if (raw.get("dtype") or raw.get("torch_dtype")) == "float32" else "bf16", cache)
    if not isinstance(described, dict):
        raise ConfigError(f"{FIELD}={shown(described)}; it must be a table. {_ASK}")
    packed = _packed(described, raw)
    if packed is None:
        raise ConfigError(f"{FIELD} of method {described.get('quant_method')!r} is not supported. {_ASK}")
    return _formats(packed, described, cache)


_EXPERTS_ALONE = ("mxfp4", "fp8,experts=mxfp4")
_ASK = "Say what a plan is to assume: --format, such as int4-128"


def _formats(packed: Packed, described: Mapping[str, Any], cache: str) -> Formats:
    if packed.bits is None and packed.name in _EXPERTS_ALONE:
        return named(packed.name, cache)
    named_ones = [str(name) for field in _LISTS for name in described.get(field) or ()]
    left = " ".join(name for name in named_ones if not name.endswith("kv_b_proj"))  # that alone is not all of attention
    plain = {role for role, pattern in _LEFT if re.search(pattern, left)}
    if len(plain) < len(_LEFT):  # else single layers are named there, not all experts
        plain.discard("experts")
    roles: list[Role] = [role for role, _ in _LEFT if role not in plain]
    name = packed.name if len(roles) == len(_LEFT) else ",".join(["bf16", *(f"{role}={packed.name}" for role in roles)])
    by_role = named(",".join(["bf16", *(f"{role}={packed.name}" for role in roles)])).by_role
    if packed.bits is None:
        return Formats(name=name, by_role=by_role, cache=cache)
    bits: dict[Role, float] = dict.fromkeys(roles, packed.bits)
    return Formats(name=f"{name} of {packed.bits:.3g} bits", by_role=by_role, cache=cache, bits=bits)


def _packed(described: Mapping[str, Any], raw: Mapping[str, Any]) -> Packed | None:
    method = str(described.get("quant_method") or described.get("quant_algo") or "").lower()
    if method in ("awq", "gptq", "awq_marlin", "gptq_marlin", "auto-round", "intel/auto-round"):
        return _whole(described.get("bits"), described.get("group_size", 128), zeros=not described.get("sym", False))
    if method in ("bitsandbytes", "bnb"):
        double = described.get("bnb_4bit_use_double_quant") is True
        return Packed("int4-128", _NF4_BITS[double]) if described.get("load_in_4bit") else Packed("int8", 8.0)
    if method == "mxfp4" or described.get("format") == "mxfp4-pack-quantized":
        return Packed("mxfp4")
    if method == "moesaic-uneven4":
        return Packed("uneven4")
    if method in ("fp8", "mxfp8", "fbgemm_fp8"):
        return _fp8(described, raw)
    if method in ("compressed-tensors", "modelopt", "nvfp4", "quark"):
        return _grouped(described)
    return None


def _fp8(described: Mapping[str, Any], raw: Mapping[str, Any]) -> Packed:
    if (described.get(EXPERTS) or raw.get(EXPERTS)) == "fp4":
        return Packed("fp8,experts=mxfp4")
    small = described.get("quant_method") == "mxfp8" or described.get("weight_block_size") == [1, 32]
    return Packed("fp8", 8.25) if small else Packed("fp8")


def _grouped(described: Mapping[str, Any]) -> Packed | None:
    """What the first group of modules says of its weights; else the name of the way alone (NVIDIA's ModelOpt)."""
    groups = described.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    if not isinstance(weights, dict):
        algorithm = str(described.get("quant_algo") or described.get("quant_method")).upper()
        known = {"NVFP4": Packed("mxfp4", 4.5), "FP8": Packed("fp8"), "W4A16_AWQ": Packed("int4-128")}
        return next((packed for name, packed in known.items() if name in algorithm), None)
    bits, group = weights.get("num_bits"), weights.get("group_size")
    if weights.get("type", "int") == "float":
        scale = 8 / group if isinstance(group, int) and group > 0 and bits == 4 else 0.0
        return Packed("mxfp4", 4 + scale) if bits == 4 else Packed("fp8") if bits == 8 else None
    return _whole(bits, group, zeros=weights.get("symmetric") is False)


def _whole(bits: Any, group: Any, *, zeros: bool) -> Packed | None:
    """Whole numbers with an fp16 scale for each group of inputs (-1: for all of a row), and a zero point beside it."""
    if not isinstance(bits, int) or bits not in (2, 3, 4, 8):
        return None
    size = group if isinstance(group, int) and group > 0 else None
    if not zeros and size is not None and (bits, size) in _NAMED:
        return Packed(_NAMED[bits, size])
    beside = 0.0 if size is None else (16 + (bits if zeros else 0)) / size
    return Packed("int8" if bits == 8 else "int4-128", bits + beside)


_NAMED = {(4, 128): "int4-128", (4, 32): "int4", (8, 32): "int8"}
