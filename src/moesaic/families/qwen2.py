"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115): a Llama with biases on queries, keys and values."""

from typing import Any

from moesaic.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig, NormConfig, StackConfig
from moesaic.families._common import HfFields, Preset, decoder_weight_map, hf_fields, shared_mlp
from moesaic.families._qwen import late_windows, window_fields
from moesaic.models.weight_map import WeightMap

NAME = "qwen2"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` qwen2. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-6))
    mlp = MlpConfig(intermediate_size=hf.size("intermediate_size"), activation=hf.activation())
    layers = tuple(
        LayerConfig(attention=_attention(hf, window), feed_forward=mlp, norm=norm) for window in late_windows(hf)
    )
    return hf.model(decoder=StackConfig(layers=layers, final_norm=norm))


def _attention(hf: HfFields, window: int | None) -> AttentionConfig:
    return AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", default=32),
        head_dim=hf.head_dim(),
        rope=hf.rope(default_theta=10_000.0),
        window=window,
        qkv_bias=True,
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    width = shared_mlp(config).intermediate_size
    return hf_fields(config, "Qwen2ForCausalLM", "window") | {"intermediate_size": width} | window_fields(config)


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in Qwen2's files."""
    return decoder_weight_map(config)


_COMMON = {
    "model_type": NAME,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
_SMALL = _COMMON | {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def _preset(size: str, fields: dict[str, Any], licence: str = "Apache-2.0") -> Preset:
    return Preset(fields, licence=licence, source=f"Qwen/Qwen2.5-{size}; arXiv:2412.15115")


PRESETS = {
    "qwen2.5-0.5b": _preset(
        "0.5B",
        _SMALL
        | {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
    ),
    "qwen2.5-1.5b": _preset(
        "1.5B",
        _SMALL
        | {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
    ),
    "qwen2.5-7b": _preset(
        "7B",
        _COMMON
        | {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
        },
    ),
    "qwen2.5-14b": _preset(
        "14B",
        _COMMON
        | {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
    ),
    "qwen2.5-32b": _preset(
        "32B",
        _COMMON
        | {
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
    ),
    "qwen2.5-72b": _preset(
        "72B",
        _COMMON
        | {
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
        licence="Qwen License",
    ),
}
