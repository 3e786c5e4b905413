"""Qwen3-MoE (arXiv:2505.09388): normed heads, many small experts, dense layers where the configuration says so."""

from typing import Any

from moesaic.config import (
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    RouterConfig,
    StackConfig,
)
from moesaic.families._common import HfFields, Preset, decoder_weight_map, hf_fields, shared_attention
from moesaic.families._qwen import EXPERTS, moe_fields, which_route
from moesaic.models.weight_map import WeightMap

NAME = "qwen3_moe"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` qwen3_moe. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-6))
    bias = hf.flag("attention_bias")  # q, k, v and o alike
    attention = AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", default=4),
        head_dim=hf.head_dim(),
        rope=hf.rope(default_theta=10_000.0),
        window=_window(hf),
        qkv_bias=bias,
        output_bias=bias,
        head_norm=norm,
    )
    layers = tuple(
        LayerConfig(attention=attention, feed_forward=_moe(hf) if routes else _mlp(hf), norm=norm)
        for routes in which_route(hf)
    )
    return hf.model(decoder=StackConfig(layers=layers, final_norm=norm))


def _window(hf: HfFields) -> int | None:
    return hf.size("sliding_window", default=4096) if hf.flag("use_sliding_window") else None


def _moe(hf: HfFields) -> MoeConfig:
    router = RouterConfig(
        name="softmax_topk",
        num_experts=hf.size("num_experts", "num_local_experts", default=128),
        top_k=hf.size("num_experts_per_tok", default=8),
        renormalize=hf.flag("norm_topk_prob"),
    )
    return MoeConfig(router=router, intermediate_size=hf.size("moe_intermediate_size"), activation=hf.activation())


def _mlp(hf: HfFields) -> MlpConfig:
    return MlpConfig(intermediate_size=hf.size("intermediate_size"), activation=hf.activation())


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    attention = shared_attention(config)
    windows = {
        "use_sliding_window": attention.window is not None,
        "sliding_window": attention.window,
        "max_window_layers": len(config.layers) if attention.window is None else 0,
    }
    biases = {"attention_bias": attention.qkv_bias}
    return hf_fields(config, "Qwen3MoeForCausalLM") | moe_fields(config) | biases | windows


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in Qwen3-MoE's files."""
    return decoder_weight_map(config, EXPERTS)


_COMMON = {
    "model_type": NAME,
    "vocab_size": 151936,
    "head_dim": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 151645,
}

PRESETS = {
    "qwen3-30b-a3b": Preset(
        _COMMON
        | {
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "moe_intermediate_size": 768,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "rope_theta": 1e6,
            "bos_token_id": 151643,
        },
        licence="Apache-2.0",
        source="Qwen/Qwen3-30B-A3B; arXiv:2505.09388",
    ),
    "qwen3-235b-a22b": Preset(
        _COMMON
        | {
            "hidden_size": 4096,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "moe_intermediate_size": 1536,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "rope_theta": 1e6,
            "bos_token_id": 151643,
        },
        licence="Apache-2.0",
        source="Qwen/Qwen3-235B-A22B; arXiv:2505.09388",
    ),
    "qwen3-coder-480b-a35b": Preset(
        _COMMON
        | {
            "hidden_size": 6144,
            "num_hidden_layers": 62,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "num_experts": 160,
            "moe_intermediate_size": 2560,
            "intermediate_size": 8192,
            "max_position_embeddings": 262144,
            "rope_theta": 1e7,
        },
        licence="Apache-2.0",
        source="Qwen/Qwen3-Coder-480B-A35B-Instruct",
    ),
}
