"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): biases on queries, keys and values, and a gated shared expert."""

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
from moesaic.families._common import HfFields, Preset, decoder_weight_map, hf_fields, shared_attention, shared_moe
from moesaic.families._qwen import EXPERTS, max_window_layers, moe_fields, read_windows, which_route, window_fields
from moesaic.models.weight_map import Piece, WeightMap

NAME = "qwen2_moe"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` qwen2_moe. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-6))
    moe, mlp = _moe(hf), MlpConfig(intermediate_size=hf.size("intermediate_size"), activation=hf.activation())
    layers = tuple(
        LayerConfig(attention=_attention(hf, window), feed_forward=moe if routes else mlp, norm=norm)
        for routes, window in zip(which_route(hf), _windows(hf), strict=True)
    )
    return hf.model(decoder=StackConfig(layers=layers, final_norm=norm))


def _windows(hf: HfFields) -> list[int | None]:
    """Every second layer has one, from the first on, up to `max_window_layers`."""
    end = max_window_layers(hf)
    return read_windows(hf, [layer % 2 == 0 and layer < end for layer in range(hf.size("num_hidden_layers"))])


def _attention(hf: HfFields, window: int | None) -> AttentionConfig:
    return AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", default=16),
        head_dim=hf.head_dim(),
        rope=hf.rope(default_theta=10_000.0),
        window=window,
        qkv_bias=hf.flag("qkv_bias", True),
    )


def _moe(hf: HfFields) -> MoeConfig:
    router = RouterConfig(
        name="softmax_topk",
        num_experts=hf.size("num_experts", default=60),
        top_k=hf.size("num_experts_per_tok", default=4),
        renormalize=hf.flag("norm_topk_prob"),
    )
    return MoeConfig(
        router=router,
        intermediate_size=hf.size("moe_intermediate_size", default=1408),
        activation=hf.activation(),
        shared=MlpConfig(
            intermediate_size=hf.size("shared_expert_intermediate_size", default=5632), activation=hf.activation()
        ),
        shared_gate=True,
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    shared = shared_moe(config).shared
    own = {
        "shared_expert_intermediate_size": shared.intermediate_size if shared else 0,
        "qkv_bias": shared_attention(config, "window").qkv_bias,
    }
    return hf_fields(config, "Qwen2MoeForCausalLM", "window") | moe_fields(config) | own | window_fields(config)


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in Qwen2-MoE's files."""
    shared = {
        f"feed_forward.shared_experts.{part}.weight": (Piece(f"mlp.shared_expert.{part}.weight"),)
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    gate = {"feed_forward.shared_gate.weight": (Piece("mlp.shared_expert_gate.weight"),)}
    return decoder_weight_map(config, EXPERTS, shared | gate)


_COMMON = {
    "model_type": NAME,
    "vocab_size": 151936,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}

PRESETS = {
    "qwen1.5-moe-a2.7b": Preset(
        _COMMON
        | {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "max_position_embeddings": 8192,
        },
        licence="Tongyi Qianwen License",
        source="Qwen/Qwen1.5-MoE-A2.7B",
    ),
    "qwen2-57b-a14b": Preset(
        _COMMON
        | {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
            "max_position_embeddings": 131072,
        },
        licence="Apache-2.0",
        source="Qwen/Qwen2-57B-A14B; arXiv:2407.10671",
    ),
}
