"""DeepSeek-V2 (arXiv:2405.04434): latent attention, softmax routing to a few groups, shared experts."""

from typing import Any

from moesaic.config import GroupConfig, ModelConfig, NormConfig, RouterConfig
from moesaic.families._common import HfFields, Preset, shared_dense, shared_moe
from moesaic.families._deepseek import (
    deepseek_weight_map,
    mla_fields,
    moe_of,
    read_mla,
    read_stack,
    require_known,
    stack_fields,
)
from moesaic.models.weight_map import WeightMap

NAME = "deepseek_v2"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` deepseek_v2. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    bias = hf.flag("mlp_bias")
    moe = moe_of(hf, _router(hf), shared_bias=bias)
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-6))
    return read_stack(hf, [read_mla(hf)] * hf.size("num_hidden_layers"), moe, norm=norm, dense_bias=bias)


def _router(hf: HfFields) -> RouterConfig:
    """A group is as good as its best expert; the chosen weights are not renormalised."""
    require_known(hf, "scoring_func", "softmax")
    require_known(hf, "norm_topk_prob", False)
    method = require_known(hf, "topk_method", "greedy", "group_limited_greedy")
    groups = None
    if method == "group_limited_greedy":
        groups = GroupConfig(num_groups=hf.size("n_group"), top_groups=hf.size("topk_group"), score="max")
    return RouterConfig(
        name="softmax_topk",
        num_experts=hf.size("n_routed_experts"),
        top_k=hf.size("num_experts_per_tok"),
        renormalize=False,
        scaling_factor=hf.number("routed_scaling_factor", 1.0),
        groups=groups,
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    moe, dense = shared_moe(config), shared_dense(config)
    has_bias = any(mlp is not None and mlp.bias for mlp in (dense, moe.shared))
    return (
        mla_fields(config, "DeepseekV2ForCausalLM")
        | stack_fields(config)
        | {
            "topk_method": "greedy" if moe.router.groups is None else "group_limited_greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "mlp_bias": has_bias,
        }
    )


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in DeepSeek-V2's files."""
    return deepseek_weight_map(config)


def _scaled(mscale: float) -> dict[str, Any]:
    return {
        "rope_theta": 10_000.0,
        "max_position_embeddings": 163840,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": mscale,
            "mscale_all_dim": mscale,
        },
    }


_COMMON = {
    "model_type": NAME,
    "vocab_size": 102400,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
}

PRESETS = {
    "deepseek-v2": Preset(
        _COMMON
        | _scaled(1.0)
        | {
            "hidden_size": 5120,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
            "routed_scaling_factor": 16.0,
        },
        licence="DeepSeek Model License",
        source="deepseek-ai/DeepSeek-V2; arXiv:2405.04434; github.com/deepseek-ai/DeepSeek-V3, config_236B.json",
    ),
    "deepseek-v2-lite": Preset(
        _COMMON
        | _scaled(0.707)
        | {
            "hidden_size": 2048,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "q_lora_rank": None,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
        },
        licence="DeepSeek Model License",
        source="deepseek-ai/DeepSeek-V2-Lite; arXiv:2405.04434; github.com/deepseek-ai/DeepSeek-V3, config_16B.json",
    ),
}
