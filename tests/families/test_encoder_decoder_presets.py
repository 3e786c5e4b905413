"""Encoder-decoders as configurations: the sizes of released ones, and what is refused."""

import dataclasses
from typing import Any

import pytest

from moesaic import families
from moesaic.errors import ConfigError
from moesaic.models.build import build
from tests.families.encoder_decoder_cases import BUILT_BY_THEM
from tests.families.golden import preset_counts

BILLIONS = {
    "switch-base-8": (0.619, 0.223),
    "switch-base-16": (1.072, 0.223),
    "switch-base-32": (1.979, 0.223),
    "switch-base-64": (3.791, 0.223),
    "switch-base-128": (7.415, 0.224),
    "switch-base-256": (14.664, 0.225),
    "switch-large-128": (26.309, 0.741),
    "switch-xxl-128": (394.675, 11.148),
    "switch-c-2048": (1571.328, 1.747),
    "nllb-moe-54b": (54.501, 3.751),
}


@pytest.mark.parametrize("name", BILLIONS)
def test_presets_count_as_their_dimensions_say(name: str) -> None:
    """Switch-XXL and Switch-C as the reference's table has them; the others were never compared with one."""
    config = families.find_preset(name)
    assert (round(config.total / 1e9, 3), round(config.active_all / 1e9, 3)) == BILLIONS[name]
    assert config.total == sum(parameter.numel() for parameter in build(config, device="meta").parameters())
    assert families.from_hf(families.to_hf(config)) == config


@pytest.mark.parametrize("name", BUILT_BY_THEM)
def test_presets_count_as_their_models_do(name: str) -> None:
    assert families.find_preset(name).total == preset_counts()[name]


def test_every_preset_has_a_count() -> None:
    with_encoder = {name for name in families.presets() if families.find_preset(name).encoder is not None}
    assert with_encoder == BILLIONS.keys()


def test_a_layout_that_no_step_gives_is_refused() -> None:
    config = families.find_preset("switch-base-8")
    assert config.encoder is not None
    dense, sparse = config.encoder.layers[:2]
    stack = dataclasses.replace(config.encoder, layers=(config.encoder.layers[0], sparse, sparse, dense))
    with pytest.raises(ConfigError, match=r"layers \[1, 2\] of 4 are MoE layers, which is no step"):
        families.to_hf(dataclasses.replace(config, encoder=stack))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"dense_act_fn": "mish"},
            "dense_act_fn='mish' is not supported; known: relu, gelu, gelu_new, silu, gated-gelu",
        ),
        ({"router_dtype": "bfloat16"}, "router_dtype='bfloat16' is not supported; known: float32"),
        ({"encoder_sparse_step": -1}, "encoder_sparse_step=-1; it must be a whole number, 0"),
        ({"relative_attention_num_buckets": 5}, "num_buckets=5 in RelativeBiasConfig; it must be even"),
        ({"relative_attention_max_distance": 4}, "max_distance=4 in RelativeBiasConfig"),
        ({"expert_capacity": 0}, "expert_capacity=0; it must be a whole number above 0"),
    ],
)
def test_switch_refuses_what_it_does_not_know(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        families.from_hf({"model_type": "switch_transformers"} | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "mish"}, "activation_function='mish' is not supported; known: relu, gelu"),
        ({"second_expert_policy": "best"}, "second='best' of a top-2 router; known: random, all, sampling"),
        ({"router_ignore_padding_tokens": True}, "router_ignore_padding_tokens=True"),
        ({"decoder_attention_heads": 7}, "d_model=1024 does not divide over decoder_attention_heads=7"),
    ],
)
def test_nllb_refuses_what_it_does_not_know(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        families.from_hf({"model_type": "nllb-moe"} | fields)


@pytest.mark.parametrize("policy", ["all", "sampling", "random"])
def test_policies_are_kept_and_evaluate_alike(policy: str) -> None:
    raw = {"model_type": "nllb-moe", "second_expert_policy": policy}
    assert families.to_hf(families.from_hf(raw))["second_expert_policy"] == policy
