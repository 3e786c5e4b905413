"""DeepSeek's own configurations (`inference/configs` of its repositories), which have no model_type, in usual words."""

from typing import Any

_FIELDS = {
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
}
_SCALED = {"rope_factor": 40, "original_seq_len": 4096, "rope_theta": 10_000.0, "mscale": 1.0}
"""What the class that reads them takes where nothing is said (inference/model.py)."""


def is_native(raw: dict[str, Any]) -> bool:
    """Whether a configuration is one of them."""
    return "model_type" not in raw and {"dim", "moe_inter_dim", "n_activated_experts", "kv_lora_rank"} <= raw.keys()


def from_native(raw: dict[str, Any]) -> dict[str, Any]:
    """The same as a config.json of deepseek_v2, deepseek_v3 or deepseek_v32."""
    plain = _SCALED | raw
    sigmoid = raw.get("score_func") == "sigmoid"
    groups = raw.get("n_expert_groups", 1) > 1
    scaling = {
        "type": "yarn",
        "factor": plain["rope_factor"],
        "original_max_position_embeddings": plain["original_seq_len"],
        "mscale": plain["mscale"],
        "mscale_all_dim": plain["mscale"],
    }
    described = {
        "model_type": "deepseek_v32" if "index_topk" in raw else "deepseek_v3" if sigmoid else "deepseek_v2",
        "max_position_embeddings": int(plain["rope_factor"] * plain["original_seq_len"]),
        "topk_method": "noaux_tc" if sigmoid else "group_limited_greedy" if groups else "greedy",
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "norm_topk_prob": sigmoid,
        "rope_theta": plain["rope_theta"],
        "rope_scaling": scaling,
        **{_FIELDS.get(name, name): value for name, value in raw.items() if name != "dtype"},
        "q_lora_rank": raw.get("q_lora_rank") or None,
    }
    if raw.get("dtype") == "fp8":
        described["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return described
