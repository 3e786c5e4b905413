"""GLM-4.5, 4.5-Air and 4.6 (arXiv:2508.06471): half of each head turns; routing and further tokens as DeepSeek-V3."""

from typing import Any

from moesaic.config import AttentionConfig, ModelConfig, NormConfig
from moesaic.families._common import HfFields, Preset, hf_fields, shared_attention
from moesaic.families._deepseek import deepseek_weight_map, read_sigmoid_moe, read_stack, stack_fields
from moesaic.models.weight_map import WeightMap

NAME = "glm4_moe"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` glm4_moe. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-5))
    attention = AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", default=8),
        head_dim=hf.head_dim(),
        rope=hf.rope(default_theta=10_000.0, partial=0.5),
        qkv_bias=hf.flag("attention_bias"),
        head_norm=norm if hf.flag("use_qk_norm") else None,
    )
    attentions = [attention] * hf.size("num_hidden_layers")
    return read_stack(hf, attentions, read_sigmoid_moe(hf), norm=norm, predicts=True)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    attention = shared_attention(config)
    rotated = {} if attention.rope is None or attention.rope.rotary_dim else {"partial_rotary_factor": 1.0}
    return (
        hf_fields(config, "Glm4MoeForCausalLM")
        | stack_fields(config)
        | rotated
        | {
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "attention_bias": attention.qkv_bias,
            "use_qk_norm": attention.head_norm is not None,
            "num_nextn_predict_layers": len(config.mtp),
        }
    )


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in GLM-4.5's files."""
    return deepseek_weight_map(config)


_COMMON = {
    "model_type": NAME,
    "vocab_size": 151552,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
}
_LARGE = _COMMON | {
    "hidden_size": 5120,
    "num_hidden_layers": 92,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}

PRESETS = {
    "glm-4.5": Preset(
        _LARGE | {"max_position_embeddings": 131072}, licence="MIT", source="zai-org/GLM-4.5; arXiv:2508.06471"
    ),
    "glm-4.6": Preset(_LARGE | {"max_position_embeddings": 202752}, licence="MIT", source="zai-org/GLM-4.6"),
    "glm-4.5-air": Preset(
        _COMMON
        | {
            "hidden_size": 4096,
            "num_hidden_layers": 46,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.0,
            "use_qk_norm": False,
            "max_position_embeddings": 131072,
        },
        licence="MIT",
        source="zai-org/GLM-4.5-Air; arXiv:2508.06471",
    ),
}
