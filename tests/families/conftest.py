"""One tiny model for every corner of every family, with weights that are far from degenerate.

Made by transformers, but for our own family and what transformers' models lack (OUR_CASES).
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic import families
from moesaic.hub import save
from moesaic.models.decoder import Decoder

COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}

# Of all models with latent attention, where not said otherwise. transformers' DeepSeek-V2 wants even latents and heads.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "n_routed_experts": 7,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 11,
    "first_k_dense_replace": 1,
}
INDEXED: dict[str, Any] = {
    **LATENT,
    "kv_lora_rank": 19,
    "qk_nope_head_dim": 9,
    "q_lora_rank": 14,
    "index_n_heads": 9,
    "index_head_dim": 11,
    "n_group": 1,
    "topk_group": 1,
}
SIGMOID: dict[str, Any] = {
    "n_routed_experts": 7,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 11,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [1.5, 3.0, 6.0, 9.0],
    "short_mscale": 1.2,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 32,
}

DBRX: dict[str, Any] = {"d_model": 48, "n_heads": 6, "n_layers": 3, "max_seq_len": 64}

# family/what is special -> fields. Sizes are unequal and odd: a transposition cannot hide.
CASES: dict[str, dict[str, Any]] = {
    "llama/tied": {"head_dim": 10, "tie_word_embeddings": True},
    "llama/biases": {"num_key_value_heads": 3, "attention_bias": True, "mlp_bias": True, "rope_theta": 5e5},
    "llama/all heads": {"num_key_value_heads": 6, "rms_norm_eps": 1e-3},
    "llama/one head of keys, stretched positions": {
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2/tied": {"head_dim": 10, "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen2/windows in the last layers": {
        "num_key_value_heads": 3,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen2/windows in listed layers": {
        "num_key_value_heads": 6,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen2/one head of keys": {"num_key_value_heads": 1, "num_hidden_layers": 1, "rms_norm_eps": 1e-3},
    "qwen2_moe/not renormalised, a dense layer": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 11,
        "shared_expert_intermediate_size": 7,
        "mlp_only_layers": [1],
        "head_dim": 10,
        "num_key_value_heads": 3,
    },
    "qwen2_moe/every second, renormalised, tied": {
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 13,
        "shared_expert_intermediate_size": 17,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
    },
    "qwen2_moe/windows, no biases, one head of keys": {
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 9,
        "shared_expert_intermediate_size": 5,
        "use_sliding_window": True,
        "sliding_window": 5,
        "qkv_bias": False,
        "num_key_value_heads": 1,
    },
    "qwen2_moe/all experts, all heads": {
        "num_experts": 3,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 7,
        "shared_expert_intermediate_size": 31,
        "num_key_value_heads": 6,
        "rms_norm_eps": 1e-3,
    },
    "olmoe/top 2 of 5": {"num_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 3},
    "olmoe/clipped, renormalised, tied": {
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "clip_qkv": 0.7,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "olmoe/biases, one head of keys": {
        "num_experts": 3,
        "num_experts_per_tok": 1,
        "attention_bias": True,
        "num_key_value_heads": 1,
        "rope_theta": 5e5,
    },
    "olmoe/all experts, all heads": {
        "num_experts": 3,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 6,
        "intermediate_size": 11,
        "rms_norm_eps": 1e-3,
    },
    "minimax_m2/as released": {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 12,
        "rotary_dim": 6,
    },
    "minimax_m2/heads that turn whole, one head of keys": {
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "head_dim": 10,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-3,
    },
    "minimax_m2/tied, top 1": {
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "head_dim": 14,
        "num_key_value_heads": 3,
        "rotary_dim": 4,
        "tie_word_embeddings": True,
        "rope_theta": 1e4,
    },
    "minimax_m2/all experts, all heads": {
        "num_local_experts": 3,
        "num_experts_per_tok": 3,
        "head_dim": 8,
        "num_key_value_heads": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.25},
        "intermediate_size": 11,
    },
    "ernie4_5_moe/as released": {
        "moe_num_experts": 5,
        "moe_k": 2,
        "moe_intermediate_size": 11,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
    "ernie4_5_moe/biases, every second from the second on": {
        "moe_num_experts": 7,
        "moe_k": 3,
        "moe_intermediate_size": 13,
        "moe_num_shared_experts": 3,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 2,
        "num_hidden_layers": 4,
        "use_bias": True,
        "tie_word_embeddings": False,
        "num_key_value_heads": 3,
    },
    "ernie4_5_moe/nothing shared, nothing dense, one head of keys": {
        "moe_num_experts": 3,
        "moe_k": 1,
        "moe_intermediate_size": 9,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,
        "tie_word_embeddings": False,
        "num_key_value_heads": 1,
        "rope_theta": 1e4,
    },
    "ernie4_5_moe/dense at both ends, wide heads": {
        "moe_num_experts": 5,
        "moe_k": 5,
        "moe_intermediate_size": 7,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
        "tie_word_embeddings": False,
        "head_dim": 10,
        "num_key_value_heads": 6,
    },
    "dbrx/as released": {
        **DBRX,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1, "rope_theta": 5e5},
        "ffn_config": {"ffn_hidden_size": 37, "moe_num_experts": 5, "moe_top_k": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    # transformers cannot run it without clip_qkv; this clips nothing.
    "dbrx/a wide clip, not renormalised, one head of keys": {
        **DBRX,
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 1e6, "rope_theta": 1e4},
        "ffn_config": {
            "ffn_hidden_size": 11,
            "moe_num_experts": 7,
            "moe_top_k": 3,
            "moe_normalize_expert_weights": None,
        },
    },
    "dbrx/all heads, top 1": {
        **DBRX,
        "attn_config": {"kv_n_heads": 6, "clip_qkv": 0.5, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 13, "moe_num_experts": 3, "moe_top_k": 1},
    },
    "dbrx/all experts, three heads of keys": {
        **DBRX,
        "n_heads": 12,
        "attn_config": {"kv_n_heads": 3, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 7, "moe_num_experts": 3, "moe_top_k": 3},
    },
    "phimoe/as released": {
        "num_local_experts": 5,
        "attention_bias": True,
        "lm_head_bias": True,
        "input_jitter_noise": 0.01,
        "router_jitter_noise": 0.4,
        "sliding_window": 64,
        "rope_parameters": LONGROPE,
    },
    "phimoe/tied, without biases, one head of keys": {
        "num_local_experts": 7,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-3,
        "router_jitter_noise": 0.3,
    },
    "phimoe/a window, a wide gap, wide heads": {
        "num_local_experts": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "sliding_window": 5,
        "router_jitter_noise": 0.2,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "phimoe/all experts, all heads, a bias of the head alone": {
        "num_local_experts": 2,
        "num_key_value_heads": 6,
        "intermediate_size": 11,
        "lm_head_bias": True,
        "router_jitter_noise": 0.5,
    },
    "mistral/window": {"sliding_window": 4, "num_key_value_heads": 3},
    "mistral/tied, no window": {"sliding_window": None, "head_dim": 10, "tie_word_embeddings": True},
    "mistral/the usual window, all heads": {"num_key_value_heads": 6, "rope_theta": 1e8},
    "mistral/one head of keys": {"num_key_value_heads": 1, "sliding_window": 7, "head_dim": 14},
    "mixtral/top 2 of 5": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 10},
    "mixtral/window, tied": {
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 3,
        "sliding_window": 4,
        "tie_word_embeddings": True,
    },
    "mixtral/top 1": {"num_local_experts": 5, "num_experts_per_tok": 1, "num_key_value_heads": 6, "rope_theta": 1e4},
    "qwen3/tied": {"head_dim": 10, "tie_word_embeddings": True},
    "qwen3/window, biases": {
        "head_dim": 14,
        "num_key_value_heads": 3,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 0,
    },
    "qwen3/windows in the last layers, one head of keys": {
        "head_dim": 10,
        "num_key_value_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen3/all heads": {"head_dim": 8, "num_key_value_heads": 6, "rope_theta": 1e6, "rms_norm_eps": 1e-3},
    "qwen3_moe/not renormalised, a dense layer": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 11,
        "mlp_only_layers": [1],
        "head_dim": 10,
        "num_key_value_heads": 3,
    },
    "qwen3_moe/every second, window, biases, tied": {
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 13,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 14,
        "rope_theta": 1e6,
    },
    "qwen3_moe/one head of keys, all experts": {
        "num_experts": 3,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 7,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "rms_norm_eps": 1e-3,
    },
    "qwen3_moe/top 1, heads as wide as hidden": {
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 9,
        "norm_topk_prob": True,
        "num_key_value_heads": 6,
    },
    "gpt_oss/as released": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 10, "sliding_window": 4},
    "gpt_oss/no biases, no windows, plain positions, top 1": {
        "num_local_experts": 6,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "num_key_value_heads": 6,
        "attention_bias": False,
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rms_norm_eps": 1e-3,
    },
    "gpt_oss/one head of keys, tied, other activation": {
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "head_dim": 14,
        "num_key_value_heads": 1,
        "sliding_window": 5,
        "tie_word_embeddings": True,
        "swiglu_limit": 0.75,
        "swiglu_alpha": 1.25,
    },
    "gpt_oss/windows everywhere, truncated": {
        "num_local_experts": 9,
        "num_experts_per_tok": 4,
        "head_dim": 12,
        "num_key_value_heads": 3,
        "intermediate_size": 11,
        "sliding_window": 3,
        "layer_types": ["sliding_attention"] * 3,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "deepseek_v2/as released, groups, scaled positions": {
        **LATENT,
        "q_lora_rank": 14,
        "topk_method": "group_limited_greedy",
        "n_routed_experts": 6,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 16.0,
        "rope_parameters": YARN,
    },
    "deepseek_v2/as the lite one": {
        **LATENT,
        "q_lora_rank": None,
        "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "first_k_dense_replace": 2,
    },
    "deepseek_v2/biases, values wider than keys, tied, nothing dense": {
        **LATENT,
        "q_lora_rank": 17,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 11,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
    },
    "deepseek_v2/one head, top 1, one mscale without the other": {
        **LATENT,
        "q_lora_rank": None,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_experts_per_tok": 1,
        "kv_lora_rank": 30,
        "rope_parameters": YARN | {"mscale": 1.25, "mscale_all_dim": 0.5},
    },
    "deepseek_v3/as released, but for what predicts further tokens": {
        **LATENT,
        "kv_lora_rank": 19,
        "qk_nope_head_dim": 9,
        "q_lora_rank": 14,
        "n_routed_experts": 9,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
        "rope_parameters": YARN,
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v3/as Kimi-K2": {
        **LATENT,
        "kv_lora_rank": 19,
        "qk_nope_head_dim": 9,
        "q_lora_rank": 14,
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": YARN | {"beta_fast": 1.0, "rope_theta": 5e4},
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v3/halves of heads, biases, not renormalised, tied": {
        **LATENT,
        "kv_lora_rank": 19,
        "qk_nope_head_dim": 9,
        "q_lora_rank": 14,
        "rope_interleave": False,
        "attention_bias": True,
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
        "tie_word_embeddings": True,
        "num_nextn_predict_layers": 0,
        "n_shared_experts": 3,
        "rms_norm_eps": 1e-3,
    },
    "deepseek_v3/queries without a latent, all groups, nothing dense": {
        **LATENT,
        "kv_lora_rank": 19,
        "qk_nope_head_dim": 9,
        "q_lora_rank": None,
        "v_head_dim": 12,
        "n_routed_experts": 10,
        "n_group": 5,
        "topk_group": 5,
        "num_experts_per_tok": 1,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
    },
    "granitemoe/every multiplier, tied": {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.4,
        "embedding_multiplier": 2.5,
        "residual_multiplier": 0.3,
        "logits_scaling": 0.7,
        "tie_word_embeddings": True,
    },
    "granitemoe/no multipliers, one head of keys": {
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 1,
        "head_dim": 14,
        "rope_theta": 1e6,
    },
    "granitemoe/biases, top 1, all heads": {
        "num_local_experts": 6,
        "num_experts_per_tok": 1,
        "num_key_value_heads": 6,
        "attention_bias": True,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "rms_norm_eps": 1e-3,
    },
    "granitemoeshared/every multiplier, tied": {
        "num_local_experts": 9,
        "num_experts_per_tok": 4,
        "shared_intermediate_size": 19,
        "head_dim": 10,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "tie_word_embeddings": True,
    },
    "granitemoeshared/no shared expert": {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 0,
        "num_key_value_heads": 3,
        "attention_bias": True,
        "logits_scaling": 3.0,
    },
    "granitemoeshared/untied, one layer, all heads": {
        "num_local_experts": 6,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 11,
        "num_key_value_heads": 6,
        "num_hidden_layers": 1,
        "embedding_multiplier": 3.0,
    },
    "granitemoeshared/one head of keys": {
        "num_local_experts": 5,
        "num_experts_per_tok": 5,
        "shared_intermediate_size": 23,
        "num_key_value_heads": 1,
        "residual_multiplier": 0.5,
        "intermediate_size": 11,
    },
    "llama4_text/as released, short chunks": {
        "intermediate_size_mlp": 23,
        "num_hidden_layers": 4,
        "num_local_experts": 5,
        "head_dim": 10,
        "attention_chunk_size": 5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama4_text/every second routed, no norms, tied, one head of keys": {
        "intermediate_size_mlp": 29,
        "num_local_experts": 7,
        "head_dim": 14,
        "num_key_value_heads": 1,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 4,
        "attn_temperature_tuning": False,
        "tie_word_embeddings": True,
    },
    "llama4_text/top 2, biases, listed layers": {
        "intermediate_size_mlp": 19,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 6,
        "head_dim": 8,
        "attention_bias": True,
        "moe_layers": [0, 2],
        "no_rope_layers": [0, 1, 1],
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "attention_chunk_size": 3,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "llama4_text/temperature": {
        "intermediate_size_mlp": 19,
        "num_local_experts": 5,
        "num_key_value_heads": 3,
        "head_dim": 12,
        "no_rope_layers": [1, 0, 0],
        "attention_chunk_size": 64,
        "floor_scale": 3,
        "attn_scale": 0.5,
    },
    "glm4_moe/as released, but for what predicts further tokens": {
        **SIGMOID,
        "head_dim": 12,
        "attention_bias": True,
        "use_qk_norm": True,
        "first_k_dense_replace": 2,
        "routed_scaling_factor": 2.5,
    },
    "glm4_moe/as Air, tied": {
        **SIGMOID,
        "head_dim": 20,
        "attention_bias": True,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "first_k_dense_replace": 0,
    },
    "glm4_moe/a quarter turns, groups, scaled positions": {
        **SIGMOID,
        "head_dim": 8,
        "n_routed_experts": 9,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.25,
        },
    },
    "glm4_moe/whole heads turn, not renormalised, top 1": {
        **SIGMOID,
        "head_dim": 10,
        "num_key_value_heads": 6,
        "use_qk_norm": True,
        "norm_topk_prob": False,
        "num_experts_per_tok": 1,
        "n_shared_experts": 2,
        "partial_rotary_factor": 1.0,
    },
    "deepseek_v32/as released, four of the visible tokens": {
        **INDEXED,
        "n_routed_experts": 9,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "rope_parameters": YARN,
        "index_topk": 4,
    },
    "deepseek_v32/all tokens, one group": {**INDEXED, "index_topk": 64, "norm_topk_prob": False, "n_shared_experts": 1},
    "deepseek_v32/one token, biases, tied, nothing dense": {
        **INDEXED,
        "index_topk": 1,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "first_k_dense_replace": 0,
    },
    "deepseek_v32/one head, narrow index": {
        **INDEXED,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "index_head_dim": 6,
        "index_topk": 7,
        "first_k_dense_replace": 2,
    },
    "glm_moe_dsa/as GLM-5": {**INDEXED, "index_topk": 4, "routed_scaling_factor": 2.5},
    "glm_moe_dsa/as GLM-5.2, the others take what the first chose": {
        **INDEXED,
        "index_topk": 3,
        "indexer_types": ["full", "shared", "shared"],
        "first_k_dense_replace": 0,
    },
    "glm_moe_dsa/shared between, biases, tied": {
        **INDEXED,
        "index_topk": 5,
        "indexer_types": ["full", "shared", "full"],
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "glm_moe_dsa/all tokens, scaled positions, groups": {
        **INDEXED,
        "index_topk": 64,
        "indexer_types": ["full", "full", "shared"],
        "n_routed_experts": 10,
        "n_group": 5,
        "topk_group": 3,
        "num_experts_per_tok": 1,
        "rope_parameters": YARN,
    },
}
# Cases in which transformers' logits of a row change with the padding beside it, and why.
ALONE = {"llama4_text/temperature": "the positions that temperature grows with count padding on the left"}

OUR_CASES: dict[str, dict[str, Any]] = {
    "moesaic/hash first, groups, shared, a dense layer": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 11,
        "shared_intermediate_size": 7,
        "head_dim": 10,
        "router": {
            "name": "sigmoid_topk",
            "selection_bias": True,
            "groups": {"num_groups": 3, "top_groups": 2},
            "scaling_factor": 2.5,
            "jitter": 0.01,
        },
        "capacity": {"factor": 1.25, "drop": "probability", "overflow": "shared"},
        "expert_dropout": 0.1,
        "overrides": [
            {"layers": [0], "router": {"name": "hash", "table": "random", "weight": "sqrt_softplus"}, "capacity": None},
            {"layers": [2], "num_experts": 0, "sliding_window": 5, "attention_bias": True, "rope_theta": 5e5},
        ],
    },
    "moesaic/every router with tensors of its own, tied": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 13,
        "head_dim": 14,
        "qk_norm": False,
        "tie_word_embeddings": True,
        "router": {"name": "noisy_topk", "noise_epsilon": 0.02},
        "overrides": [
            {"layers": [1], "router": {"name": "relu", "start": 1e-3}, "num_experts": 7},
            {"layers": [2], "router": {"name": "null_topk", "num_null_experts": 2, "batch_norm": True}},
        ],
    },
    # transformers drops what predicts further tokens: see test_mtp.py.
    "deepseek_v3/two further tokens": {
        **LATENT,
        "kv_lora_rank": 19,
        "qk_nope_head_dim": 9,
        "q_lora_rank": 14,
        "n_group": 1,
        "rope_scaling": YARN,
        "num_nextn_predict_layers": 2,
    },
    "glm4_moe/a further token": {
        **SIGMOID,
        "head_dim": 12,
        "attention_bias": True,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": 1e-6,
    },
    "deepseek_v32/a further token": {**INDEXED, "index_topk": 4, "num_nextn_predict_layers": 1},
    "deepseek_v3/a further token, tied": {
        **LATENT,
        "q_lora_rank": None,
        "n_routed_experts": 6,
        "n_group": 3,
        "topk_group": 2,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": True,
    },
}


class Oracle(NamedTuple):
    """A transformers model and the folder that transformers saved it to.

    goes_alone: each row has to go through it without padding (see ALONE).
    """

    model: Any
    folder: Path
    goes_alone: bool = False


def tiny_model(family: str, fields: dict[str, Any]) -> Any:
    """A transformers model with weights of std 0.2 and norms around 1."""
    config = AutoConfig.for_model(family, **COMMON | fields)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
        for name, parameter in model.named_parameters():
            if "norm" in name.split(".")[-2]:
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)
    return model


def our_folder(family: str, fields: dict[str, Any], folder: Path) -> None:
    """A tiny model that only we have, saved by us."""
    model = Decoder(families.from_hf({"model_type": family, **COMMON, **fields}), dtype=torch.float32).initialize(7)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.2, generator=generator)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=generator) / 10)
    save(model, folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """Cases by name, each made once; our own have no model of theirs."""
    transformers.utils.logging.disable_progress_bar()

    @cache
    def make(case: str) -> Oracle:
        family = case.partition("/")[0]
        folder = tmp_path_factory.mktemp(family)
        if case in OUR_CASES:
            our_folder(family, OUR_CASES[case], folder)
            return Oracle(None, folder)
        model = tiny_model(family, CASES[case])
        model.save_pretrained(folder)
        return Oracle(model, folder, goes_alone=case in ALONE)

    return make


@pytest.fixture(params=CASES)
def oracle(request: pytest.FixtureRequest, made: Callable[[str], Oracle]) -> Oracle:
    return made(request.param)


@pytest.fixture(params=[*CASES, *OUR_CASES])
def folder(request: pytest.FixtureRequest, made: Callable[[str], Oracle]) -> Path:
    """A saved model of any family, ours too."""
    return made(request.param).folder


@pytest.fixture(scope="session")
def families_in_cases() -> set[str]:
    return {name.partition("/")[0] for name in CASES | OUR_CASES}
