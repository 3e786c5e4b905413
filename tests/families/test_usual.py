"""Decoders of the usual fields: those that are known, those that are not, and DeepSeek's own configurations."""

import importlib
import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic.errors import ConfigError
from moesaic.families import _counted
from moesaic.families._usual import KNOWN
from moesaic.hub.resolve import describe_config
from moesaic.plan.plan import ServingPlan, make_plan

SMALL = {
    "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12,
    "vocab_size": 131, "intermediate_size": 26, "moe_intermediate_size": 14, "num_experts_per_tok": 2,
    "pad_token_id": 0,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 22, "kv_lora_rank": 18, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 12,
    "num_key_value_heads": 8, "head_dim": 6, "n_routed_experts": 6, "n_shared_experts": 2,
}  # fmt: skip
SPARSE = {"sparse_attention_freq": [0, 1, 0, 1, 1], "sparse_num_index_heads": 2, "sparse_index_dim": 10}
M3 = {
    "num_local_experts": 6, "dense_intermediate_size": 30, "shared_intermediate_size": 20,
    "moe_layer_freq": [0, 1, 1, 1, 1], "sparse_attention_config": SPARSE,
}  # fmt: skip
STEP = {
    "n_routed_experts": 6, "share_expert_dim": 20, "sliding_window": 16, "num_nextn_predict_layers": 1,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "attention_other_setting": {"num_attention_heads": 12}, "moe_layers_enum": "2,3,4",
}  # fmt: skip
ROUTED = {"n_routed_experts": 6, "n_shared_experts": 2}
EXPERTS = {"num_experts": 6}
SHARING = EXPERTS | {"shared_expert_intermediate_size": 20}
OWN = {
    "afmoe": EXPERTS | {"num_shared_experts": 2, "num_dense_layers": 2},
    "aria_text": {"moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 2},
    "axk1": LATENT | {"n_group": 1, "topk_group": 1},
    "dots1": ROUTED | {"first_k_dense_replace": 1},
    "exaone_moe": EXPERTS | {"num_shared_experts": 2},
    "flint": SHARING,
    "glm4_moe_lite": LATENT,
    "glm4v_moe_text": ROUTED,
    "granitemoe_swa": {"num_local_experts": 6, "shared_intermediate_size": 20},
    "hunyuan_v1_moe": EXPERTS | {"moe_topk": 2},
    "hy_v3": EXPERTS | {"num_shared_experts": 2},
    "kolibri1": SHARING,
    "laguna": SHARING | {"num_attention_heads_per_layer": [8, 12, 8, 8, 4]},
    "mellum": EXPERTS,
    "minimax_m3_vl_text": M3,
    "mistral4": LATENT,
    "qwen3_vl_moe_text": EXPERTS,
    "solar_open": ROUTED,
    "step3p5": STEP,
}


def theirs(fields):
    """What transformers' module of the text part holds, with a head where there is none of its own."""
    config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config).num_parameters()
        except ValueError:
            module = importlib.import_module(type(config).__module__.replace("configuration", "modeling"))
            kinds = {name: kind for name, kind in vars(module).items() if name.endswith("Model")}
            kind: Any = next((kind for name, kind in kinds.items() if name.endswith("TextModel")), None)
            head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
            return (kind or module.Mistral4Model)(config).num_parameters() + head


@pytest.mark.parametrize("case", OWN)
def test_they_hold_as_many_parameters_as_theirs(case):
    fields = SMALL | OWN[case] | {"model_type": case}
    model = _counted.count(fields)
    assert model.total == theirs(fields) and model.assumed == ""
    assert 0 < model.active_gemm < model.total


def test_names_for_the_same():
    """`model_type`s of released files that transformers has under another name, or as a part of a whole."""
    known = {"minimax_m3": M3, "minimax_m3_text": M3, "step3p7": STEP, "qwen3_omni_moe_text": EXPERTS}
    like = {"minimax_m3": "minimax_m3_vl_text", "minimax_m3_text": "minimax_m3_vl_text", "step3p7": "step3p5"}
    for name, fields in known.items():
        same = SMALL | fields | {"model_type": like.get(name, "qwen3_vl_moe_text"), "tie_word_embeddings": False}
        assert _counted.count(SMALL | fields | {"model_type": name}).total == _counted.count(same).total
    assert set(OWN) | set(known) | {"deepseek"} == KNOWN.keys()


def test_a_release_that_transformers_lacks():
    """DeepSeekMoE-16B (arXiv:2401.06066): 16.4B in total, 2.8B of them active."""
    fields = {
        "model_type": "deepseek", "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "vocab_size": 102400,
    }  # fmt: skip
    model = _counted.count(fields)
    assert (round(model.total / 1e9, 1), round(model.active_all / 1e9, 1)) == (16.4, 2.8)


def _file(tmp_path, fields):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path / "config.json"


NEW = SMALL | {"model_type": "brandnew", "num_experts": 6, "num_key_value_heads": 4, "attention_sparkle": 3}


def test_what_is_assumed_of_an_unknown_model_type_is_said(tmp_path, capsys):
    path = _file(tmp_path, NEW)
    model = describe_config(path)
    said = capsys.readouterr().err
    assert "'brandnew' is not known: taken for a decoder of 5 layers of grouped-query attention, 2 of 6 experts" in said
    assert "nothing was made of attention_sparkle" in said and "hidden_size" not in said
    qwen = {name: value for name, value in NEW.items() if name != "attention_sparkle"} | {"model_type": "mellum"}
    assert model.total == _counted.count(qwen).total - 5 * 2 * 12  # but for the norms of its heads
    assert str(make_plan(path).to_dict()["assumed"]) in said


def test_its_fields_are_read_in_other_spellings(tmp_path):
    other = {
        "model_type": "brandnew", "d_model": 48, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "head_size": 12,
        "vocab_size": 131, "intermediate_size": 26, "expert_intermediate_size": [14] * 5, "num_routed_experts": 6,
        "experts_per_token": [2, 2, 2, 2, 2], "num_shared_expert": [1] * 5,
    }  # fmt: skip
    plain = NEW | {"num_shared_experts": 1}
    assert describe_config(_file(tmp_path, other)).total == describe_config(_file(tmp_path, plain)).total
    both = {"use_qk_norm": True, "layer_types": ["sliding_attention"] * 4 + ["full_attention"], "sliding_window": 32}
    model = describe_config(_file(tmp_path, NEW | both))
    assert [each.window for each in model.states()] == [32] * 4 + [None]
    assert model.total == describe_config(_file(tmp_path, NEW)).total + 5 * 2 * 12


@pytest.mark.parametrize("none", [None, 0, 1])
def test_without_experts_it_is_dense(tmp_path, none):
    model = describe_config(_file(tmp_path, NEW | {"num_experts": none}))
    assert not model.moe_layers and model.active_all == model.total


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({"linear_num_heads": 4}, "unknown model_type 'brandnew'.*linear_num_heads tell of parts that cannot be"),
        ({"num_experts_per_tok": 9}, "9 of 6 experts a token"),
        ({"num_experts": [6, 8]}, "differs between layers"),
        ({"layer_types": ["conv"] * 5}, "layer_types has 'conv'; known: sliding_attention"),
        ({"mlp_layer_types": ["dense"]}, "a list of 1 kinds for 5 layers"),
        ({"hidden_size": None}, "no hidden_size or d_model"),
        ({"first_k_dense_replace": -1}, "whole number from 0 to 5"),
    ],
)
def test_what_cannot_be_taken_for_usual_is_refused(tmp_path, fields, seen):
    with pytest.raises(ConfigError, match=seen):
        describe_config(_file(tmp_path, NEW | fields))


@pytest.mark.parametrize("place", ["text_config", "language_config", "llm_config", "thinker_config"])
def test_text_parts_in_other_places(tmp_path, place):
    whole = {"model_type": "seer", place: SMALL | EXPERTS | {"model_type": "mellum"}, "vision_config": {}}
    if place == "thinker_config":
        whole[place] = {"text_config": whole[place]}
    assert (
        describe_config(_file(tmp_path, whole)).total
        == _counted.count(SMALL | EXPERTS | {"model_type": "mellum"}).total
    )


LITE = {
    "vocab_size": 102400, "dim": 2048, "inter_dim": 10944, "moe_inter_dim": 1408, "n_layers": 27, "n_dense_layers": 1,
    "n_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2, "n_activated_experts": 6, "route_scale": 1.0,
    "q_lora_rank": 0, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "mscale": 0.707,
}  # fmt: skip
LARGE = LITE | {
    "vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61, "n_dense_layers": 3,
    "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 8, "n_expert_groups": 8,
    "n_limited_groups": 4, "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 1536, "dtype": "fp8",
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "preset", "format"),
    [
        (LITE, "deepseek-v2-lite", "bf16"),
        (LARGE, "deepseek-v3", "fp8"),
        (LARGE | {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}, "deepseek-v3.2", "fp8"),
    ],
)
def test_configurations_in_deepseeks_own_words(tmp_path, fields, preset, format):
    ours, known = make_plan(_file(tmp_path, fields)), make_plan(preset)
    assert isinstance(ours, ServingPlan) and isinstance(known, ServingPlan)
    assert ours.serving.config.total == known.serving.config.total
    assert ours.serving.config.active_all == known.serving.config.active_all
    assert ours.serving.formats.name == format
