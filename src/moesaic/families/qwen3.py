"""Qwen3 (arXiv:2505.09388), dense: a Llama with normed heads. The dense twin of a Qwen3-MoE."""

from typing import Any

from moesaic.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig, NormConfig, StackConfig
from moesaic.errors import ConfigError
from moesaic.families._common import (
    HfFields,
    Preset,
    decoder_weight_map,
    hf_fields,
    refusal,
    shared_attention,
    the_same,
)
from moesaic.models.weight_map import WeightMap

NAME = "qwen3"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` qwen3. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-6))
    bias = hf.flag("attention_bias")  # q, k, v and o alike
    windows = _windows(hf)
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
        for window in windows
    )
    return hf.model(decoder=StackConfig(layers=layers, final_norm=norm))


def _windows(hf: HfFields) -> list[int | None]:
    """The layers from `max_window_layers` on look at a window, if the configuration asks for windows at all."""
    num_layers = hf.size("num_hidden_layers")
    if not hf.flag("use_sliding_window"):
        return [None] * num_layers
    window, first = hf.size("sliding_window", default=4096), hf.get("max_window_layers", default=28)
    kinds = hf.get("layer_types", default=["full_attention"] * first + ["sliding_attention"] * num_layers)[:num_layers]
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) < num_layers:
        raise ConfigError(f"layer_types={kinds!r}; give full_attention or sliding_attention for {num_layers} layers")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    if config.moe_layers:
        raise refusal(NAME, "it has MoE layers")
    attention = shared_attention(config)
    mlp = the_same("the feed-forward block", NAME, (layer.feed_forward for layer in config.layers))
    if not isinstance(mlp, MlpConfig):
        raise refusal(NAME, "it has Soft MoE layers")
    windowed = attention.window is not None
    return hf_fields(config, "Qwen3ForCausalLM") | {
        "intermediate_size": mlp.intermediate_size,
        "attention_bias": attention.qkv_bias,
        "use_sliding_window": windowed,
        "sliding_window": attention.window,
        "max_window_layers": 0 if windowed else len(config.layers),
        "layer_types": ["sliding_attention" if windowed else "full_attention"] * len(config.layers),
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in Qwen3's files."""
    return decoder_weight_map(config)


PRESETS: dict[str, Preset] = {}
