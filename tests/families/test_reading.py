"""Reading a config.json without trust: both spellings, and one clear line for what cannot be."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from moesaic import families
from moesaic.config import ModelConfig, MoeConfig, SoftMoeConfig
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
QWEN = LLAMA | {"model_type": "qwen3_moe", "num_key_value_heads": 2, "moe_intermediate_size": 11, "num_experts": 9}


def moe_of(config: ModelConfig, layer: int = 0) -> MoeConfig:
    moe = config.layers[layer].feed_forward
    assert isinstance(moe, MoeConfig)
    return moe


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
    assert families.from_hf(LLAMA | spelling).layers[0].attention.rope.theta == 7e4


def test_rotary_base_when_nothing_is_said_is_the_familys() -> None:
    seen = [families.from_hf(raw).layers[0].attention.rope.theta for raw in (LLAMA, MIXTRAL, QWEN)]
    assert seen == [1e4, 1e6, 1e4]


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
    assert (off.layers[0].attention.window, on.layers[0].attention.window) == (None, 16)


@pytest.mark.parametrize(("eos", "read"), [(2, (2,)), ([2, 7], (2, 7)), (None, ()), ([], ())])
def test_end_tokens_may_be_one_or_many(eos: Any, read: tuple[int, ...]) -> None:
    config = families.from_hf(LLAMA | {"eos_token_id": eos})
    assert config.eos_token_ids == read
    assert families.from_hf(families.to_hf(config)) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (LLAMA | {"model_type": "gpt5"}, "unknown model_type 'gpt5'.*llama, mixtral, moesaic, qwen3"),
        ({"hidden_size": 3}, "no model_type in the configuration; known: llama"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; known: silu"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            "rope_scaling of type 'llama3'.*known: default",
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
        (MIXTRAL | {"num_experts_per_tok": 6}, "top_k=6 is more than num_experts=5; use 1 to 5"),
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
        ("mixtral", LIMITED, "capacity is CapacityConfig"),
        ("mixtral", DROPPED, "expert_dropout is 0.1"),
        ("mixtral", change_layers(PLAIN, lambda _: SOFT), "it has no MoE layer"),
        ("qwen3", change_layers(families.from_hf(LLAMA), lambda _: SOFT), "it has Soft MoE layers"),
        ("llama", change_layers(families.from_hf(LLAMA), lambda _: SOFT), "it has MoE layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_one_line(family: str, config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot be written as {family}: .*{message}"):
        families.to_hf(dataclasses.replace(config, family=family))
