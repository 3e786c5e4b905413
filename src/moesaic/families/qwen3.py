"""Qwen3 (arXiv:2505.09388), dense: a Llama with normed heads. The dense twin of a Qwen3-MoE."""

from typing import Any

from moesaic.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig, NormConfig, StackConfig
from moesaic.families._common import HfFields, Preset, decoder_weight_map, hf_fields, shared_attention, shared_mlp
from moesaic.families._qwen import late_windows, window_fields
from moesaic.models.weight_map import WeightMap

NAME = "qwen3"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` qwen3. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-6))
    bias = hf.flag("attention_bias")  # q, k, v and o alike
    layers = tuple(
        LayerConfig(
            attention=AttentionConfig(
                num_heads=hf.size("num_attention_heads"),
                num_key_value_heads=hf.size("num_key_value_heads", default=32),
                head_dim=hf.size("head_dim", default=128),
                rope=hf.rope(default_theta=10_000.0),
                window=window,
                qkv_bias=bias,
                output_bias=bias,
                head_norm=norm,
            ),
            feed_forward=MlpConfig(intermediate_size=hf.size("intermediate_size"), activation=hf.activation()),
            norm=norm,
        )
        for window in late_windows(hf)
    )
    return hf.model(decoder=StackConfig(layers=layers, final_norm=norm))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    fields = {
        "intermediate_size": shared_mlp(config).intermediate_size,
        "attention_bias": shared_attention(config, "window").qkv_bias,
    }
    return hf_fields(config, "Qwen3ForCausalLM", "window") | fields | window_fields(config)


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in Qwen3's files."""
    return decoder_weight_map(config)


def _preset(size: str, fields: dict[str, Any]) -> Preset:
    common = {
        "model_type": NAME,
        "vocab_size": 151936,
        "head_dim": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
    return Preset(common | fields, licence="Apache-2.0", source=f"Qwen/Qwen3-{size}; arXiv:2505.09388")


PRESETS = {
    "qwen3-0.6b": _preset(
        "0.6B",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-8b": _preset(
        "8B",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
        },
    ),
    "qwen3-14b": _preset(
        "14B",
        {
            "hidden_size": 5120,
            "intermediate_size": 17408,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
        },
    ),
    "qwen3-32b": _preset(
        "32B",
        {
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
        },
    ),
}
