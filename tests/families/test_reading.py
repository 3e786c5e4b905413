"""Reading a config.json without trust: both spellings, and one clear line for what cannot be."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from moesaic import families
from moesaic.config import (
    AttentionConfig,
    ClampedSwiglu,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    SoftMoeConfig,
    YarnConfig,
)
from moesaic.config.capacity import CapacityConfig
from moesaic.errors import ConfigError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 5}
GPT_OSS = LLAMA | {"model_type": "gpt_oss", "num_key_value_heads": 2, "num_local_experts": 5}
OLMOE = LLAMA | {"model_type": "olmoe", "num_experts": 5, "num_experts_per_tok": 2}
MINIMAX = LLAMA | {"model_type": "minimax_m2", "num_key_value_heads": 2, "num_local_experts": 9, "head_dim": 8}
ERNIE = LLAMA | {"model_type": "ernie4_5_moe", "num_key_value_heads": 2}
PHI = LLAMA | {"model_type": "phimoe", "num_key_value_heads": 2}
DBRX = {
    "model_type": "dbrx",
    "vocab_size": 131,
    "d_model": 48,
    "n_heads": 6,
    "n_layers": 2,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 5e5},
    "ffn_config": {"moe_num_experts": 5},
}
QWEN = LLAMA | {"model_type": "qwen3_moe", "num_key_value_heads": 2, "moe_intermediate_size": 11, "num_experts": 9}


def moe_of(config: ModelConfig, layer: int = 0) -> MoeConfig:
    moe = config.layers[layer].feed_forward
    assert isinstance(moe, MoeConfig)
    return moe


def attention_of(config: ModelConfig, layer: int = 0) -> AttentionConfig:
    attention = config.layers[layer].attention
    assert isinstance(attention, AttentionConfig)
    return attention


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 7e4},
        {"rope_theta": 7e4, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
        {"rope_parameters": {"rope_theta": 7e4}, "rope_theta": 7e4},
        {"rope_scaling": {"type": "default"}, "rope_theta": 7e4},
    ],
)
def test_rotary_base_in_every_spelling(spelling: dict[str, Any]) -> None:
    assert attention_of(families.from_hf(LLAMA | spelling)).rope == RopeConfig(theta=7e4)


def test_rotary_base_when_nothing_is_said_is_the_familys() -> None:
    seen = [attention_of(families.from_hf(raw)).rope for raw in (LLAMA, MIXTRAL, QWEN)]
    assert seen == [RopeConfig(theta=theta) for theta in (1e4, 1e6, 1e4)]


def test_num_experts_goes_by_two_names() -> None:
    for raw in (MIXTRAL, QWEN):
        without = {name: value for name, value in raw.items() if "experts" not in name}
        for name in ("num_experts", "num_local_experts"):
            assert moe_of(families.from_hf(without | {name: 13, "num_experts_per_tok": 2})).router.num_experts == 13


def test_qwen_layers_route_where_step_and_list_allow() -> None:
    raw = QWEN | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert families.from_hf(raw).moe_layers == (1, 5)


def test_qwen_renormalises_only_when_told() -> None:
    assert [moe_of(families.from_hf(QWEN | more)).router.renormalize for more in ({}, {"norm_topk_prob": True})] == [
        False,
        True,
    ]


def test_qwen_ignores_a_window_that_is_switched_off() -> None:
    off = families.from_hf(QWEN | {"sliding_window": 16, "use_sliding_window": False})
    on = families.from_hf(QWEN | {"sliding_window": 16, "use_sliding_window": True})
    assert (attention_of(off).window, attention_of(on).window) == (None, 16)


def test_gpt_oss_says_little_and_means_much() -> None:
    config = families.from_hf(GPT_OSS)
    first, second = attention_of(config), attention_of(config, 1)
    assert (first.window, second.window, first.sinks, first.qkv_bias) == (128, None, True, True)
    assert first.rope == RopeConfig(
        theta=150_000.0, scaling=YarnConfig(factor=32.0, original_length=4096, truncate=False)
    )
    moe = moe_of(config)
    assert moe.bias and moe.router.bias and moe.router.top_k == 4
    assert moe.activation == ClampedSwiglu(limit=7.0, alpha=1.702, shift=1.0)


@pytest.mark.parametrize(("eos", "read"), [(2, (2,)), ([2, 7], (2, 7)), (None, ()), ([], ())])
def test_end_tokens_may_be_one_or_many(eos: Any, read: tuple[int, ...]) -> None:
    config = families.from_hf(LLAMA | {"eos_token_id": eos})
    assert config.eos_token_ids == read
    assert families.from_hf(families.to_hf(config)) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (LLAMA | {"model_type": "gpt5"}, "unknown model_type 'gpt5'.*llama, .*mixtral, moesaic, .*qwen3"),
        ({"hidden_size": 3}, "no model_type in the configuration; known: .*llama"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; known: silu"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 8}},
            "rope_scaling of type 'dynamic'.*known: default, linear, llama3, yarn",
        ),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set of fields for all layers"),
        (LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta=10000.0 but rope_parameters"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (LLAMA | {"num_attention_heads": 7}, "hidden_size=48 does not divide over num_attention_heads=7"),
        (LLAMA | {"num_key_value_heads": 4}, "num_heads=6 is not a multiple of num_key_value_heads=4"),
        (LLAMA | {"hidden_size": "48"}, "hidden_size='48'; it must be a whole number"),
        (LLAMA | {"num_attention_heads": 0}, "num_attention_heads=0; it must be a whole number"),
        (LLAMA | {"vocab_size": None}, "no vocab_size; every llama model states it"),
        (LLAMA | {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'; it must be true or false"),
        (LLAMA | {"rms_norm_eps": "small"}, "rms_norm_eps='small'; it must be a number"),
        (LLAMA | {"eos_token_id": "</s>"}, "eos_token_id='</s>'; it must be a token id"),
        (LLAMA | {"quantization_config": {"quant_method": "awq"}}, "quantization_config of method 'awq'"),
        (
            {"model_type": "seer", "vision_config": {}, "text_config": MIXTRAL},
            "model_type 'seer' has a text part .text_config. of model_type 'mixtral', which is known, but what its",
        ),
        (
            {"model_type": "seer", "text_config": {"model_type": "reader"}},
            "'seer' has a text part .text_config. of model_type 'reader', and neither is known; known: .*llama",
        ),
        (
            {"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text"}},
            "'qwen3_5_moe' has a text part .* 'qwen3_5_moe_text', which is counted .* do not run yet; `moesaic count`",
        ),
        (
            {"model_type": "jamba"},
            "model_type 'jamba' is counted and planned from its configuration only.* do not run yet",
        ),
        (MIXTRAL | {"num_experts_per_tok": 6}, "top_k=6 is more than num_experts=5; use 1 to 5"),
        (GPT_OSS | {"layer_types": ["full_attention"]}, "layer_types=.*for each of 2 layers"),
        (GPT_OSS | {"layer_types": ["full_attention", "linear_attention"]}, "give full_attention or sliding_attention"),
        (GPT_OSS | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (
            LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2, "max_window_layers": -1},
            "max_window_layers=-1; it",
        ),
        (
            QWEN | {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 2},
            "layer_types=.*give full_attention or sliding_attention for each of 2 layers",
        ),
        (OLMOE | {"head_dim": 10}, "head_dim=10 of 6 heads; olmoe needs hidden_size=48 in all"),
        (OLMOE | {"clip_qkv": "8"}, "clip_qkv='8'; it must be a number"),
        (MINIMAX | {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported; known: 'sigmoid'"),
        (MINIMAX | {"qk_norm_type": "per_head"}, "qk_norm_type='per_head' is not supported; known: 'per_layer'"),
        (MINIMAX | {"attn_type_list": [0, 1]}, "attn_type_list=.0, 1. is not supported; known: 1 .softmax. in all"),
        (MINIMAX | {"rotary_dim": 3}, "rotary_dim=3 is odd; rotary positions need an even one"),
        (ERNIE | {"moe_norm_min": 0.5}, "moe_norm_min=0.5 is not supported"),
        (ERNIE | {"moe_layer_start_index": "1"}, "moe_layer_start_index='1'; it must be the index of a layer"),
        (ERNIE | {"use_bias": True}, "head_bias with tie_word_embeddings"),
        (PHI | {"num_experts_per_tok": 3}, "num_experts_per_tok=3 is not supported; known: 2"),
        (
            PHI | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "without long_factor, short_mscale, long",
        ),
        (DBRX | {"attn_config": None}, "attn_config=None; every dbrx model states it, as a table of fields"),
        (DBRX | {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta=500000.0 but rope_parameters says 10000.0"),
        (DBRX | {"ffn_config": {"ffn_act_fn": {"name": "gelu"}}}, "ffn_act_fn=.*gelu.* is not supported; known: silu"),
        (DBRX | {"ffn_config": {"moe_normalize_expert_weights": 2}}, "moe_normalize_expert_weights=2 is not supported"),
        (QWEN | {"mlp_only_layers": [2]}, "mlp_only_layers=.2.; it must be a list of layers from 0 to 1"),
    ],
)
def test_what_cannot_be_read_is_one_line(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        families.from_hf(raw)
    assert "\n" not in str(caught.value)


def change_layers(config: ModelConfig, change: Callable[[Any], Any]) -> ModelConfig:
    layers = (dataclasses.replace(layer, feed_forward=change(layer.feed_forward)) for layer in config.layers)
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, layers=tuple(layers)))


def change_moe(config: ModelConfig, **router: Any) -> ModelConfig:
    return change_layers(config, lambda moe: dataclasses.replace(moe, router=dataclasses.replace(moe.router, **router)))


PLAIN = families.from_hf(MIXTRAL)
LIMITED = change_layers(PLAIN, lambda moe: dataclasses.replace(moe, capacity=CapacityConfig(factor=1)))
DROPPED = change_layers(PLAIN, lambda moe: dataclasses.replace(moe, expert_dropout=0.1))
SOFT = SoftMoeConfig(num_experts=3, slots_per_expert=2, intermediate_size=4)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("mixtral", change_moe(families.from_hf(MIXTRAL), name="sigmoid_topk"), "router.name is 'sigmoid_topk'"),
        ("mixtral", change_moe(families.from_hf(MIXTRAL), renormalize=False), "renormalize is False"),
        ("mixtral", change_moe(families.from_hf(MIXTRAL), selection_bias=True), "selection_bias is True"),
        ("mixtral", change_moe(families.from_hf(MIXTRAL), scaling_factor=2.5), "scaling_factor is 2.5"),
        ("mixtral", families.from_hf(QWEN | {"mlp_only_layers": [0], "norm_topk_prob": True}), "layers are dense"),
        ("mixtral", families.from_hf(LLAMA), "it has no MoE layer"),
        ("mixtral", families.from_hf(LLAMA | MIXTRAL | {"model_type": "qwen3_moe", "moe_intermediate_size": 3,
            "num_experts_per_tok": 2, "norm_topk_prob": True}), "head_norm is"),
        ("llama", families.from_hf(MIXTRAL), "it has MoE layers"),
        ("llama", families.from_hf(LLAMA | {"num_attention_heads": 5, "head_dim": 8}), "hidden_size=48 is not a"),
        ("qwen3_moe", families.from_hf(MIXTRAL), "head_norm is None"),
        ("mixtral", change_moe(PLAIN, jitter=0.1), "jitter is 0.1"),
        ("gpt_oss", families.from_hf(MIXTRAL), "activation is 'silu' and not a clamped SwiGLU"),
        ("gpt_oss", families.from_hf(QWEN | {"mlp_only_layers": [0]}), "some of its layers are dense"),
        ("gpt_oss", change_layers(families.from_hf(GPT_OSS), lambda moe: dataclasses.replace(
            moe, activation=ClampedSwiglu(limit=7.0))), "shift is 0.0"),
        ("mixtral", LIMITED, "capacity is CapacityConfig"),
        ("mixtral", DROPPED, "expert_dropout is 0.1"),
        ("mixtral", change_layers(PLAIN, lambda _: SOFT), "it has no MoE layer"),
        ("qwen3", change_layers(families.from_hf(LLAMA), lambda _: SOFT), "it has Soft MoE layers"),
        ("llama", change_layers(families.from_hf(LLAMA), lambda _: SOFT), "it has Soft MoE layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_one_line(family: str, config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot be written as {family}: .*{message}"):
        families.to_hf(dataclasses.replace(config, family=family))
