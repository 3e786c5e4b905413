"""DeepSeek-V3 (arXiv:2412.19437) and R1: latent attention, sigmoid routing by selection biases, multi-token prediction.

Kimi-K2 (`kimi_k2`) is one, and is written under this name, which every reader knows.
"""

from typing import Any

from moesaic.config import MlaConfig, ModelConfig, NormConfig
from moesaic.families._common import HfFields, Preset
from moesaic.families._deepseek import (
    deepseek_weight_map,
    mla_fields,
    read_mla,
    read_sigmoid_moe,
    read_stack,
    stack_fields,
)
from moesaic.models.weight_map import WeightMap

NAME = "deepseek_v3"
ALIASES = ("kimi_k2",)


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` deepseek_v3 or kimi_k2. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw | {"model_type": NAME})
    attention = read_mla(hf, "interleaved" if hf.flag("rope_interleave", True) else "half")
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-6))
    attentions = [attention] * hf.size("num_hidden_layers")
    return read_stack(hf, attentions, read_sigmoid_moe(hf), norm=norm, predicts=True)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    fields = mla_fields(config, "DeepseekV3ForCausalLM") | stack_fields(config)
    attention = config.layers[0].attention
    return fields | {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": isinstance(attention, MlaConfig) and attention.rope.layout == "interleaved",
        "num_nextn_predict_layers": len(config.mtp),
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in DeepSeek-V3's files."""
    return deepseek_weight_map(config)


_COMMON = {
    "model_type": NAME,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
}

_V3 = _COMMON | {
    "vocab_size": 129280,
    "num_attention_heads": 128,
    "n_routed_experts": 256,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163840,
    "rope_theta": 10_000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
}

PRESETS = {
    "deepseek-v3": Preset(_V3, licence="DeepSeek Model License", source="deepseek-ai/DeepSeek-V3; arXiv:2412.19437"),
    "deepseek-r1": Preset(_V3, licence="MIT", source="deepseek-ai/DeepSeek-R1; arXiv:2501.12948"),
    "deepseek-v3.1": Preset(_V3, licence="MIT", source="deepseek-ai/DeepSeek-V3.1"),
    "kimi-k2": Preset(
        _COMMON
        | {
            "vocab_size": 163840,
            "num_attention_heads": 64,
            "n_routed_experts": 384,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
            "max_position_embeddings": 131072,
            "rope_theta": 50_000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 32,
                "original_max_position_embeddings": 4096,
                "beta_fast": 1,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            "bos_token_id": 163584,
            "eos_token_id": 163585,
        },
        licence="Modified MIT",
        source="moonshotai/Kimi-K2-Instruct; arXiv:2507.20534",
    ),
}
