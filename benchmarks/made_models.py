"""Models that nobody trained, of varied shapes, drawn in memory: what benchmarks run on where no folders are at hand.

Each is described as its family's config.json would be. Random weights route almost evenly, and take the same time as
trained ones wherever time does not depend on values.
"""

from typing import Any

from moesaic import families
from moesaic.config import ModelConfig

_COMMON: dict[str, Any] = {
    "vocab_size": 32_000, "max_position_embeddings": 4096, "tie_word_embeddings": False, "hidden_act": "silu",
    "rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "norm_topk_prob": True,
}  # fmt: skip

MADE: dict[str, dict[str, Any]] = {
    "grouped": _COMMON | {
        "model_type": "qwen3_moe", "hidden_size": 768, "num_hidden_layers": 10, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 64, "num_experts": 24, "num_experts_per_tok": 2,
        "moe_intermediate_size": 512, "intermediate_size": 1536,
    },
    "fine": _COMMON | {
        "model_type": "qwen3_moe", "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
        "num_key_value_heads": 8, "head_dim": 64, "num_experts": 64, "num_experts_per_tok": 8,
        "moe_intermediate_size": 192, "intermediate_size": 1536,
    },
    "latent": _COMMON | {
        "model_type": "deepseek_v3", "hidden_size": 640, "num_hidden_layers": 8, "num_attention_heads": 10,
        "num_key_value_heads": 10, "n_routed_experts": 32, "num_experts_per_tok": 4, "n_shared_experts": 1,
        "moe_intermediate_size": 256, "intermediate_size": 1792, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "q_lora_rank": 320, "kv_lora_rank": 192, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
        "v_head_dim": 64, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0,
    },
    "dense": _COMMON | {
        "model_type": "qwen3", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 2560,
    },
}  # fmt: skip
"""Few experts and heads that share keys; many fine-grained experts; latent attention and a shared expert; dense."""


def made(name: str) -> ModelConfig:
    """The model of this name."""
    return families.from_hf(MADE[name])
