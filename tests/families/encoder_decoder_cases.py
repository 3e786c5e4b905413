"""The fields of one tiny encoder-decoder for every corner of their families: sizes are unequal and odd."""

from typing import Any

# What transformers calls families whose name is no name in Python.
THEIR_NAMES = {"nllb_moe": "nllb-moe"}

_SWITCH: dict[str, Any] = {
    "vocab_size": 131,
    "d_model": 48,
    "d_kv": 10,
    "d_ff": 37,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_heads": 3,
    "num_experts": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": 0,
}
_NLLB: dict[str, Any] = {
    "vocab_size": 131,
    "d_model": 48,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 29,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 6,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_experts": 5,
    "max_position_embeddings": 64,
}

# family/what is special -> fields.
CASES: dict[str, dict[str, Any]] = {
    "switch_transformers/tied, the second of every three": _SWITCH,
    "switch_transformers/all sparse, untied, little room": {
        **_SWITCH,
        "num_sparse_encoder_layers": 3,
        "num_sparse_decoder_layers": 2,
        "expert_capacity": 3,
        "tie_word_embeddings": False,
        "eos_token_id": [1, 5],
    },
    "switch_transformers/router biases, GELU, a head for each bucket": {
        **_SWITCH,
        "router_bias": True,
        "dense_act_fn": "gelu_new",
        "d_kv": 7,
        "num_heads": 8,
        "num_experts": 7,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 20,
    },
    "switch_transformers/stated steps, a dense decoder, one slot": {
        **_SWITCH,
        "num_layers": 4,
        "num_decoder_layers": 3,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 0,
        "expert_capacity": 1,
        "layer_norm_epsilon": 1e-3,
        "relative_attention_num_buckets": 4,
    },
    "switch_transformers/gated, untied": {**_SWITCH, "dense_act_fn": "gated-gelu", "tie_word_embeddings": False},
    "switch_transformers/square matrices": {
        **_SWITCH,
        "d_ff": 48,
        "d_kv": 16,
        "num_layers": 4,
        "num_decoder_layers": 4,
    },
    "nllb_moe/as released": _NLLB,
    "nllb_moe/limited by tokens, prioritised, divided before": {
        **_NLLB,
        "moe_eval_capacity_token_fraction": 0.3,
        "batch_prioritized_routing": True,
        "normalize_router_prob_before_dropping": True,
        "moe_token_dropout": 0.0,
    },
    "nllb_moe/limited by number, untied, all sparse": {
        **_NLLB,
        "moe_eval_capacity_token_fraction": -1.0,
        "expert_capacity": 5,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "encoder_ffn_dim": 31,
        "decoder_ffn_dim": 31,
        "tie_word_embeddings": False,
    },
    "nllb_moe/router biases, GELU, dense decoder, plain embeddings": {
        **_NLLB,
        "router_bias": True,
        "activation_function": "gelu",
        "decoder_sparse_step": 0,
        "encoder_layers": 4,
        "num_experts": 7,
        "scale_embedding": False,
        "moe_token_dropout": 0.4,
        "pad_token_id": 3,
    },
    "nllb_moe/two experts, half of the tokens, in their order": {
        **_NLLB,
        "num_experts": 2,
        "moe_eval_capacity_token_fraction": 0.5,
    },
    "nllb_moe/square matrices": {
        **_NLLB,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_layers": 4,
        "decoder_layers": 4,
    },
}
# transformers' model has blocks without a gate only, and so cannot load what it is made to compute here.
NOT_LOADED_BY_THEM = {"switch_transformers/gated, untied"}
# transformers counts padding as tokens of which the capacity is a share, so that it lets more of the others through.
SHARE_COUNTS_PADDING = {
    name for name, fields in CASES.items() if 0 < fields.get("moe_eval_capacity_token_fraction", 1) < 1
}
# The presets of which transformers' model can be built in a moment: the largest has 61,440 experts, and one has gates.
BUILT_BY_THEM = ("switch-base-8", "switch-base-32", "nllb-moe-54b")
