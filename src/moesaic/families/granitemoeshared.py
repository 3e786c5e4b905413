"""Granite MoE with an expert that every token passes (`model_type` granitemoeshared)."""

from typing import Any

from moesaic.config import MlpConfig, ModelConfig
from moesaic.families import _granite
from moesaic.families._common import HfFields, Preset, refusal, shared_moe
from moesaic.models.weight_map import WeightMap

NAME = "granitemoeshared"
PRESETS: dict[str, Preset] = {}


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` granitemoeshared. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    if hf.get("shared_intermediate_size", default=0) == 0:
        return _granite.read(raw)
    width = hf.size("shared_intermediate_size")
    return _granite.read(raw, MlpConfig(intermediate_size=width, activation=hf.activation()))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    shared = shared_moe(config).shared
    if shared is not None and shared.bias:
        raise refusal(NAME, "its shared expert has biases")
    return _granite.write(config, "GraniteMoeSharedForCausalLM") | {
        "shared_intermediate_size": shared.intermediate_size if shared else 0
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in Granite's files."""
    return _granite.weight_map(config)
