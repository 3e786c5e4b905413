"""Rotary positions in a config.json: read in every spelling, written in those that readers old and new know."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from moesaic.config import LinearConfig, Llama3Config, LongRopeConfig, RopeConfig, YarnConfig
from moesaic.config.rope import RopeScaling
from moesaic.errors import ConfigError
from moesaic.fields import names_of, read_part, refuse_unknown

_KINDS: dict[str, type[RopeScaling]] = {
    "linear": LinearConfig,
    "llama3": Llama3Config,
    "yarn": YarnConfig,
    "longrope": LongRopeConfig,
}
_ORIGINAL = "original_max_position_embeddings"
_SPELLED = {"original_length": _ORIGINAL}
_OF_ANY_KIND = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_rope(
    raw: dict[str, Any],
    default_theta: float,
    *,
    head_dim: Callable[[], int],
    layout: Literal["half", "interleaved"] = "half",
    partial: float | None = None,
) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    partial: the share of a head that turns where nothing is said; None: this family turns whole heads.
    Raises ConfigError for kinds and fields that we do not know, and for two spellings that contradict each other.
    """
    key = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    extra = raw.get(key) or {}
    if not isinstance(extra, dict) or any(isinstance(value, dict) for value in extra.values()):
        raise ConfigError(f"{key}={extra!r} is not supported; known: one set of fields for all layers")
    return RopeConfig(
        theta=_number("rope_theta", _theta(raw, extra, key), default_theta),
        layout=layout,
        rotary_dim=_rotary_dim(raw, extra, partial, head_dim),
        scaling=_scaling(raw, extra, key),
    )


def _theta(raw: dict[str, Any], extra: dict[str, Any], key: str) -> Any:
    inner, outer = extra.get("rope_theta"), raw.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        raise ConfigError(f"rope_theta={outer!r} but {key} says {inner!r}; keep one of them")
    return outer if inner is None else inner


def _rotary_dim(
    raw: dict[str, Any], extra: dict[str, Any], partial: float | None, head_dim: Callable[[], int]
) -> int | None:
    inner, outer = extra.get("partial_rotary_factor"), raw.get("partial_rotary_factor")
    share = _number("partial_rotary_factor", outer if inner is None else inner, 1.0 if partial is None else partial)
    if share == 1:
        return None
    if partial is None:
        raise ConfigError(f"partial_rotary_factor={share!r} is not supported; known: 1.0")
    if not 0 < share < 1:
        raise ConfigError(f"partial_rotary_factor={share!r}; it must be above 0 and at most 1")
    return int(head_dim() * share)


def _scaling(raw: dict[str, Any], extra: dict[str, Any], key: str) -> RopeScaling | None:
    kind = extra.get("rope_type", extra.get("type", "default"))
    if kind == "default":
        return None
    if kind not in _KINDS:
        raise ConfigError(f"{key} of type {kind!r} is not supported; known: default, {', '.join(_KINDS)}")
    part = _KINDS[kind]
    names = {name: _SPELLED.get(name, name) for name in names_of(part)}
    given = {name: value for name, value in extra.items() if value is not None and name not in _OF_ANY_KIND}
    refuse_unknown(key, given, names.values())
    if "original_length" in names:
        # transformers takes the outer one (Phi) before the inner one, and the context where there is neither.
        given.setdefault(_ORIGINAL, raw.get("max_position_embeddings"))
        given[_ORIGINAL] = raw.get(_ORIGINAL) or given[_ORIGINAL]
    return read_part(part, {name: given[said] for name, said in names.items() if said in given}, key)


def _number(name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}; it must be a number")
    return float(value)


def rope_fields(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    """The fields of a config.json. The layout is not among them: it follows from the family."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_parameters": parameters}
    if rope.scaling is not None:
        kind = next(name for name, part in _KINDS.items() if isinstance(rope.scaling, part))
        stated = {
            _SPELLED.get(field.name, field.name): list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(rope.scaling)
            if (value := getattr(rope.scaling, field.name)) is not None
        }
        parameters |= {"rope_type": kind} | stated
        fields["rope_scaling"] = {"type": kind, "rope_type": kind} | stated
    if rope.rotary_dim is not None:
        parameters["partial_rotary_factor"] = fields["partial_rotary_factor"] = turning_share(rope.rotary_dim, head_dim)
    return fields


def turning_share(rotary_dim: int, head_dim: int) -> float:
    """The share that readers, who round its product with head_dim down, take for `rotary_dim`."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 1.0)
