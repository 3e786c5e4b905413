"""Granite MoE (Granite 3.0 and 3.1): every layer an MoE, embeddings, scores, residuals and logits with multipliers."""

from typing import Any

from moesaic.config import ModelConfig
from moesaic.families import _granite
from moesaic.families._common import Preset
from moesaic.models.weight_map import WeightMap

NAME = "granitemoe"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` granitemoe. Raises ConfigError for what we cannot express."""
    return _granite.read(raw)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    return _granite.write(config, "GraniteMoeForCausalLM")


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in Granite's files."""
    return _granite.weight_map(config)


def _preset(name: str, **sizes: int) -> Preset:
    fields = {
        "model_type": NAME,
        "vocab_size": 49155,
        "intermediate_size": 512,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return Preset(fields | sizes, licence="Apache-2.0", source=f"ibm-granite/{name}-instruct")


PRESETS = {
    "granite-3.0-1b-a400m": _preset(
        "granite-3.0-1b-a400m", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, num_local_experts=32
    ),
    "granite-3.0-3b-a800m": _preset(
        "granite-3.0-3b-a800m", hidden_size=1536, num_hidden_layers=32, num_attention_heads=24, num_local_experts=40
    ),
}
