"""DeepSeek's families and those after them: what their configurations say, and one clear line for what cannot be."""

import dataclasses
from typing import Any

import pytest

from moesaic import families
from moesaic.config import AttentionConfig, IndexerConfig, MlaConfig, ModelConfig, MoeConfig, StackConfig, YarnConfig
from moesaic.errors import ConfigError

V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 37,
    "moe_intermediate_size": 11,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "q_lora_rank": None,
    "kv_lora_rank": 19,
    "qk_nope_head_dim": 9,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
}
V2 = V3 | {"model_type": "deepseek_v2"}
INDEX = {"index_n_heads": 3, "index_head_dim": 8, "index_topk": 4, "q_lora_rank": 14}
V32 = V3 | INDEX | {"model_type": "deepseek_v32"}
DSA = V3 | INDEX | {"model_type": "glm_moe_dsa"}
GLM4 = V3 | {"model_type": "glm4_moe", "num_key_value_heads": 2, "head_dim": 12}


def without(raw: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key != name}


def mla_of(config: ModelConfig, layer: int = 0) -> MlaConfig:
    attention = config.layers[layer].attention
    assert isinstance(attention, MlaConfig)
    return attention


def test_kimi_is_deepseek_v3_under_another_name() -> None:
    kimi = families.from_hf(V3 | {"model_type": "kimi_k2"})
    assert kimi == families.from_hf(V3)
    assert families.to_hf(kimi)["model_type"] == "deepseek_v3"
    assert families.family("kimi_k2") is families.family("deepseek_v3")
    assert "kimi_k2" not in families.names()


def test_shared_experts_are_one_as_wide_as_they() -> None:
    moe = families.from_hf(V3).layers[1].feed_forward
    assert isinstance(moe, MoeConfig) and moe.shared is not None
    assert moe.shared.intermediate_size == 22


@pytest.mark.parametrize("raw", [V2, V3, V32, DSA, GLM4])
def test_dense_layers_come_first(raw: dict[str, Any]) -> None:
    assert families.from_hf(raw).moe_layers == (1, 2, 3)
    assert families.from_hf(raw | {"first_k_dense_replace": 3}).moe_layers == (3,)
    kinds = ["dense", "dense", "sparse", "sparse"]
    assert families.from_hf(raw | {"mlp_layer_types": kinds}).moe_layers == (2, 3)


def test_groups_are_scored_as_the_paper_of_their_family_says() -> None:
    groups = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
    for raw, score in ((V2 | groups, "max"), (V3 | groups | {"topk_method": "noaux_tc"}, "top2_sum")):
        moe = families.from_hf(raw).layers[1].feed_forward
        assert isinstance(moe, MoeConfig) and moe.router.groups is not None
        assert moe.router.groups.score == score


@pytest.mark.parametrize(
    ("said", "indexers"),
    [
        ({}, "FFFF"),
        ({"indexer_types": ["full", "shared", "shared", "full"]}, "F00F"),
        ({"index_topk_pattern": "FFSS"}, "FF11"),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, "F0F2"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, "FFF2"),
    ],
)
def test_layers_without_an_indexer_take_the_last_ones_choice(said: dict[str, Any], indexers: str) -> None:
    config = families.from_hf(DSA | said)
    seen = [mla_of(config, layer).indexer for layer in range(4)]
    assert "".join("F" if isinstance(each, IndexerConfig) else str(each) for each in seen) == indexers
    assert families.from_hf(families.to_hf(config)) == config


def test_half_of_each_glm_head_turns_unless_said_otherwise() -> None:
    for said, rotary_dim in (({}, 6), ({"partial_rotary_factor": 0.25}, None), ({"partial_rotary_factor": 1.0}, None)):
        said = said | {"head_dim": 16} if rotary_dim is None else said
        attention = families.from_hf(GLM4 | said).layers[0].attention
        assert isinstance(attention, AttentionConfig) and attention.rope is not None
        assert attention.rope.rotary_dim == (4 if said.get("partial_rotary_factor") == 0.25 else rotary_dim)


def test_yarn_is_read_in_every_spelling() -> None:
    yarn = {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    expected = YarnConfig(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0)
    for said in (
        {"rope_scaling": yarn | {"type": "yarn"}, "rope_theta": 10000},
        {"rope_parameters": yarn | {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_scaling": yarn | {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "truncate": None}},
    ):
        assert mla_of(families.from_hf(V3 | said)).rope.scaling == expected
    short = {"factor": 2, "type": "yarn"}
    scaling = mla_of(families.from_hf(V3 | {"rope_scaling": short})).rope.scaling
    assert isinstance(scaling, YarnConfig) and scaling.original_length == 64


@pytest.mark.parametrize("raw", [V2, V3, V32, DSA | {"index_topk_pattern": "FSSF"}, GLM4])
def test_a_description_survives_json(raw: dict[str, Any]) -> None:
    config = families.from_hf(raw | {"num_nextn_predict_layers": 2})
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert len(config.mtp) == (0 if raw is V2 else 2)


def test_states_are_latent_and_counted() -> None:
    config = families.from_hf(V3)
    assert {state.kind for state in config.states()} == {"latent"}
    assert config.state_bytes(10) == 4 * 10 * (19 + 6) * 2
    assert families.from_hf(V32).state_bytes(10) == 4 * 10 * (19 + 6 + 8) * 2


def test_flops_grow_with_the_context_up_to_what_an_indexer_chooses() -> None:
    plain, sparse = families.from_hf(V3 | {"q_lora_rank": 14}), families.from_hf(V32)
    assert plain.flops_per_token(100) - plain.flops_per_token() == 4 * 2 * 6 * (15 + 7) * 100
    assert sparse.flops_per_token(100) - sparse.flops_per_token() == 4 * (2 * 6 * (15 + 7) * 4 + 2 * 3 * (8 + 1) * 100)


@pytest.mark.parametrize("pattern", ["FFFF", "FSSS", "FSFS"])
def test_layers_that_take_a_choice_attend_to_the_chosen_and_choose_nothing(pattern: str) -> None:
    config = families.from_hf(DSA | {"index_topk_pattern": pattern})
    attending, choosing = 2 * 6 * (15 + 7), 2 * 3 * (8 + 1)
    for length in (3, 100):
        scores = config.flops_per_token(length) - config.flops_per_token()
        assert scores == 4 * attending * min(length, 4) + pattern.count("F") * choosing * length


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (V2 | {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'.*known: 'greedy', 'group_limited_greedy'"),
        (V2 | {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not supported; known: 'softmax'"),
        (V2 | {"norm_topk_prob": True}, "norm_topk_prob=True is not supported; known: False"),
        (V3 | {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported; known: 'sigmoid'"),
        (V3 | {"topk_method": "greedy"}, "topk_method='greedy' is not supported; known: 'noaux_tc'"),
        (V3 | {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported; known: 1"),
        (V3 | {"num_key_value_heads": 2}, "num_key_value_heads=2 with num_attention_heads=6: latent"),
        (V3 | {"first_k_dense_replace": 5}, "first_k_dense_replace=5; use a whole number from 0 to 4"),
        (V3 | {"mlp_layer_types": ["sparse", "dense"] * 2}, "mlp_layer_types=.* is not supported; known: dense, then"),
        (V3 | {"qk_rope_head_dim": 7}, "head_dim=7 is odd"),
        (V3 | {"n_group": 3, "topk_group": 1}, "num_groups=3 does not divide num_experts=8"),
        (V3 | {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1; it must be a whole number"),
        (V3 | {"n_shared_experts": None}, "no n_shared_experts; every deepseek_v3 model states it"),
        (without(V3, "q_lora_rank"), "no q_lora_rank; state it, or null"),
        (without(V3, "kv_lora_rank"), "no kv_lora_rank; every deepseek_v3 model states it"),
        (V3 | {"rope_scaling": {"type": "yarn"}}, "rope_scaling without factor"),
        (V3 | {"rope_scaling": {"type": "yarn", "factor": 0.5}}, "rope factor=0.5; it must be 1 or more"),
        (
            V3 | {"rope_scaling": {"type": "yarn", "factor": 2, "mscale_all": 1}},
            "unknown field 'mscale_all' in rope_sc",
        ),
        (V3 | {"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor='2'; it must be a number"),
        (V3 | {"rope_scaling": {"type": "su", "factor": 2}}, "of type 'su' is not supported; known: default, linear"),
        (V32 | {"q_lora_rank": None}, "an indexer without query_rank"),
        (V32 | {"index_head_dim": 4}, "rotary_dim=6 is more than head_dim=4"),
        (without(V32, "index_topk"), "no index_topk; every deepseek_v32 model states it"),
        (DSA | {"indexer_types": ["shared", "full", "full", "full"]}, "indexer_types=.* the first one full"),
        (DSA | {"index_topk_pattern": "FFX"}, "indexer_types=.* for each of 4 layers"),
        (DSA | {"indexer_rope_interleave": False}, "indexer_rope_interleave=False is not supported; known: True"),
    ],
)
def test_what_cannot_be_read_is_one_line(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        families.from_hf(raw)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "raw", "message"),
    [
        ("deepseek_v2", V3, "router.name is 'sigmoid_topk'"),
        ("deepseek_v3", V2, "router.name is 'softmax_topk'"),
        ("deepseek_v3", V32, "indexer is IndexerConfig"),
        ("deepseek_v3", GLM4, "not all of its attention is latent"),
        ("deepseek_v32", V3, "it has no indexer"),
        ("deepseek_v32", DSA | {"index_topk_pattern": "FFSF"}, "layout is 'interleaved'"),
        ("glm_moe_dsa", V32, "layout is 'half'"),
        ("glm4_moe", V3, "its attention keeps latents"),
        ("mixtral", V3, "its attention keeps latents"),
        ("deepseek_v2", V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1}, None),
        ("deepseek_v3", V3 | {"num_nextn_predict_layers": 1}, None),
        ("deepseek_v2", V3 | {"num_nextn_predict_layers": 1}, "is .* and would be read back as"),
    ],
)
def test_what_cannot_be_written_is_one_line(family: str, raw: dict[str, Any], message: str | None) -> None:
    config = dataclasses.replace(families.from_hf(raw), family=family)
    if message is None:
        assert families.from_hf(families.to_hf(config)) == config
        return
    with pytest.raises(ConfigError, match=f"cannot be written as {family}: .*{message}"):
        families.to_hf(config)


def test_a_choice_comes_from_an_earlier_layer() -> None:
    layer = families.from_hf(V32).layers[0]
    for source in (0, 1, 2):
        taker = dataclasses.replace(layer, attention=dataclasses.replace(mla_of(families.from_hf(V32)), indexer=source))
        if source == 0:
            StackConfig(layers=(layer, taker))
            continue
        with pytest.raises(ConfigError, match=f"layer 1 takes the tokens that layer {source} chose, which is no earl"):
            StackConfig(layers=(layer, taker, layer))
