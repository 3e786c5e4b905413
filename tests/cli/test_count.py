"""`moesaic count`."""

import json
import re
from itertools import cycle
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic import families, hub
from moesaic.cli import field_plot
from moesaic.cli.count import describe
from moesaic.families import _counted
from moesaic.families._published import PUBLISHED


def test_json_holds_the_counts(moesaic, moe_folder):
    config = hub.read_config(moe_folder)
    ran = moesaic("count", moe_folder, "--json", "--context", "7", "--dtype", "fp32")
    assert ran.exit_code == 0
    assert ran.err == ""
    assert {key: ran.json[key] for key in ("total", "active_gemm", "active_all", "roles")} == {
        "total": config.total,
        "active_gemm": config.active_gemm,
        "active_all": config.active_all,
        "roles": config.roles,
    }
    assert sum(ran.json["roles"].values()) == config.total
    assert sum(ran.json["active_roles"].values()) == config.active_all
    assert ran.json["weight_bytes"] == 4 * config.total
    assert ran.json["state_bytes_per_token"] == 2 * 2 * (2 * 6) * 4  # layers, keys and values, heads x size, bytes
    assert ran.json["state_bytes"] == 7 * ran.json["state_bytes_per_token"]
    assert ran.json["flops_per_token"] == config.flops_per_token(7)
    assert ran.json["experts"] == ["2 of 5"]


def test_counts_are_those_of_the_files(moesaic, moe_folder):
    from safetensors import safe_open

    with safe_open(next(moe_folder.glob("*.safetensors")), "pt") as file:
        numel = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (no iteration)
    assert moesaic("count", moe_folder, "--json").json["total"] == numel


def test_table_names_the_rules(moesaic, moe_folder):
    ran = moesaic("count", moe_folder / "config.json")
    assert ran.exit_code == 0
    for seen in ("active_gemm", "multiplied for one token", "experts", "2 of 5 experts a token", "sparsity", "FLOPs"):
        assert seen in ran.out


def test_dense_models_have_no_sparsity(dense_folder):
    document = describe("dense", hub.read_config(dense_folder))
    assert (document["sparsity"], document["experts"], document["moe_layers"]) == (0, [], 0)


def test_all_lists_every_preset(moesaic):
    models = moesaic("count", "--all", "--json").json["models"]
    assert {model["model"]: model["total"] for model in models if model["runs"]} == {
        name: families.find_preset(name).total for name in families.presets()
    }
    assert {model["model"] for model in models if not model["runs"]} == _counted.PRESETS.keys()
    assert all(model["licence"] and model["source"] for model in models)
    ran = moesaic("count", "--all")
    assert all(model["model"] in ran.out for model in models)
    assert ran.err.splitlines()[-1].startswith("next: moesaic count ")


def test_published_figures_stand_beside(moesaic):
    assert moesaic("count", "mixtral-8x7b", "--json").json["published"] == {"total": "46.7B", "active": "12.9B"}
    out = moesaic("count", "mixtral-8x7b").out
    assert "published: 46.7B in total, 12.9B active" in out and "licence Apache-2.0; source mistralai/Mixtral" in out
    assert PUBLISHED.keys() & families.presets().keys() and _counted.PRESETS.keys() & PUBLISHED.keys()


def test_layers_that_predict_further_tokens_are_counted_apart(moesaic):
    config = families.find_preset("deepseek-v3")
    document = moesaic("count", "deepseek-v3", "--json").json
    assert (document["mtp_total"], document["mtp_active"]) == (config.mtp_total, config.mtp_active)
    assert document["mtp_total"] > document["mtp_active"] > 0 and document["total"] == config.total
    out = moesaic("count", "deepseek-v3").out
    assert f"{config.mtp_total:,}" in out and f"{config.mtp_active:,}" in out
    assert moesaic("count", "kimi-k2", "--json").json["mtp_total"] == 0 and "mtp" not in moesaic("count", "kimi-k2").out


def test_sizes_that_nothing_confirmed_are_marked(moesaic, tmp_path):
    ran = moesaic("count", "granite-4.0-h-tiny")
    assert ran.out.startswith("granite-4.0-h-tiny (unverified) (") and "unverified: sizes from memory" in ran.err
    assert moesaic("count", "granite-4.0-h-tiny", "--json").json["verified"] is False
    ran = moesaic("count", "--all", "--plot", tmp_path / "field.svg")
    assert "granite-4.0-h-tiny (unverified)" in ran.out and "unverified: " in ran.err
    assert "granite-4.0-h-tiny (unverified): 6.94G" in (tmp_path / "field.svg").read_text()
    assert "unverified" not in str(moesaic("count", "mixtral-8x7b"))


def test_the_field_is_drawn(moesaic, tmp_path):
    ran = moesaic("count", "--all", "--plot", tmp_path / "field.svg")
    assert ran.exit_code == 0 and f"drawn: {tmp_path / 'field.svg'}" in ran.err
    picture = ElementTree.parse(tmp_path / "field.svg").getroot()
    titles = [title.text for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 2 * len(families.presets() | _counted.PRESETS)
    assert "mixtral-8x7b: 46.7G in total, 12.7G active" in titles
    for circle in picture.iter("{http://www.w3.org/2000/svg}circle"):
        assert 0 <= float(circle.get("cx", "-1")) <= field_plot.WIDTH


# Of every kind of layer some, at sizes that are all different.
TINY = {
    "qwen3_next": {
        "hidden_size": 40, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 14, "shared_expert_intermediate_size": 22,
        "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 10, "linear_value_head_dim": 8,
        "vocab_size": 131,
    },
    "jamba": {
        "hidden_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 26, "num_experts": 5, "num_experts_per_tok": 2, "vocab_size": 131, "mamba_d_state": 6,
        "mamba_dt_rank": 7, "attn_layer_period": 4, "attn_layer_offset": 2, "tie_word_embeddings": True,
    },
    "granitemoehybrid": {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 26, "shared_intermediate_size": 34, "num_local_experts": 5, "num_experts_per_tok": 2,
        "vocab_size": 131, "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 10, "mamba_n_groups": 1,
        "mamba_expand": 2, "layer_types": ["mamba", "attention", "mamba"], "tie_word_embeddings": True,
    },
    "nemotron_h": {
        "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 14,
        "hybrid_override_pattern": "ME*EM", "mamba_num_heads": 6, "mamba_head_dim": 8, "ssm_state_size": 10,
        "n_groups": 2, "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 18,
        "moe_shared_expert_intermediate_size": 22, "n_shared_experts": 1, "vocab_size": 131, "conv_kernel": 4,
    },
}  # fmt: skip
TINY["nemotron_h listed"] = {
    **{name: value for name, value in TINY["nemotron_h"].items() if name != "hybrid_override_pattern"},
    "layers_block_type": ["mamba", "moe", "attention", "moe", "mamba"],
}
TINY["nemotron_h latent"] = TINY["nemotron_h"] | {"moe_latent_size": 20}
TINY["nemotron_h biased"] = TINY["nemotron_h"] | {"use_bias": True, "use_conv_bias": False}
TINY["qwen3_5_moe_text"] = TINY["qwen3_next"]
TINY["qwen3_next listed"] = TINY["qwen3_next"] | {
    "layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"],
    "mlp_only_layers": [1], "intermediate_size": 30, "decoder_sparse_step": 2, "tie_word_embeddings": True,
}  # fmt: skip
TINY["jamba biased"] = TINY["jamba"] | {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": "auto"}
TINY["granitemoehybrid biased"] = TINY["granitemoehybrid"] | {
    "mamba_proj_bias": True, "mamba_conv_bias": False, "attention_bias": True, "num_key_value_heads": None,
}  # fmt: skip
TINY["kimi_linear"] = {
    "hidden_size": 40, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 26, "moe_intermediate_size": 14, "num_experts": 6, "num_experts_per_token": 2,
    "num_shared_experts": 2, "kv_lora_rank": 18, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 12,
    "linear_attn_config": {
        "full_attn_layers": [3, 6], "kda_layers": [1, 2, 4, 5], "head_dim": 8, "num_heads": 3,
        "short_conv_kernel_size": 5,
    },
    "vocab_size": 131, "first_k_dense_replace": 2, "pad_token_id": 0,
}  # fmt: skip
TINY["kimi_linear listed"] = {
    **{name: value for name, value in TINY["kimi_linear"].items() if name != "linear_attn_config"},
    "linear_num_heads": 3, "linear_head_dim": 8, "q_lora_rank": 22, "mlp_layer_types": ["dense"] + ["sparse"] * 5,
}  # fmt: skip
TINY["minimax"] = {
    "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "intermediate_size": 26, "num_local_experts": 5, "num_experts_per_tok": 2, "vocab_size": 131,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
TINY["mimo_v2_flash"] = {
    "hidden_size": 40, "num_hidden_layers": 7, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12,
    "v_head_dim": 10, "intermediate_size": 26, "moe_intermediate_size": 14, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "vocab_size": 131,
}  # fmt: skip
TINY["flex_olmo"] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 26, "num_experts": 5, "num_experts_per_tok": 2, "vocab_size": 131, "pad_token_id": 0,
}  # fmt: skip
TINY["gemma4_text"] = {
    "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "enable_moe_block": True,
    "intermediate_size": 26, "moe_intermediate_size": 14, "num_experts": 6, "top_k_experts": 2, "vocab_size": 131,
    "hidden_size_per_layer_input": 0, "sliding_window": 64, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip


@pytest.mark.parametrize("case", TINY)
def test_models_that_are_only_counted_are_as_large_as_theirs(moesaic, tmp_path, case):
    fields = TINY[case] | {"model_type": case.split()[0]}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for place in (tmp_path, tmp_path / "config.json"):
        ran = moesaic("count", place, "--json")
        assert ran.json["total"] == theirs.num_parameters() == sum(ran.json["roles"].values())
        assert ran.json["runs"] is False and sum(ran.json["active_roles"].values()) == ran.json["active_all"]
    said = moesaic("count", tmp_path)
    assert "some of its layers do not run yet" in said.err and "of them MoE" in said.out


def test_experts_that_compute_nothing_have_no_weights(moesaic, tmp_path):
    """LongCat-Flash: transformers' module has rows for them in one of the two stacks, the released files have none."""
    fields = {
        "model_type": "longcat_flash", "hidden_size": 40, "num_layers": 2, "num_attention_heads": 4, "vocab_size": 131,
        "ffn_hidden_size": 26, "expert_ffn_hidden_size": 14, "n_routed_experts": 6, "zero_expert_num": 3, "moe_topk": 4,
        "q_lora_rank": 22, "kv_lora_rank": 18, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 12,
    }  # fmt: skip
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    held = theirs.num_parameters() - 2 * 3 * 2 * 14 * 40
    assert moesaic("count", tmp_path, "--json").json["total"] == held


# Billions in total, active with the embedding table and without it: sums over the released shapes.
BILLIONS = {
    "qwen3-next-80b-a3b": (79.674, 3.875, 3.564),
    "qwen3.5-35b-a3b": (34.661, 3.455, 2.946),
    "jamba-v0.1": (51.570, 12.110, 11.842),
    "nemotron-3-nano-30b-a3b": (31.578, 3.580, 3.228),
    "nemotron-3-super-120b-a12b": (120.669, 12.770, 12.233),
}


@pytest.mark.parametrize("name", BILLIONS)
def test_counted_releases(moesaic, name):
    counts = moesaic("count", name, "--json").json
    assert tuple(round(counts[key] / 1e9, 3) for key in ("total", "active_all", "active_gemm")) == BILLIONS[name]


NEMOTRON = TINY["nemotron_h"] | {"model_type": "nemotron_h"}
SEER = {"model_type": "seer", "vision_config": {"hidden_size": 8}, "audio_config": None, "tie_word_embeddings": True}


@pytest.mark.parametrize("case", ["qwen2_moe", "qwen3_next"])
def test_of_models_for_more_than_text_the_text_part_is_counted(moesaic, tmp_path, case):
    text = {**TINY["qwen3_next"], "intermediate_size": 30, "max_position_embeddings": 64, "model_type": case}
    (tmp_path / "text.json").write_text(json.dumps(text | {"tie_word_embeddings": True}))
    packed = {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(SEER | {"text_config": text | packed}))
    ran = moesaic("count", tmp_path, "--json")
    assert ran.json | {"model": ""} == moesaic("count", tmp_path / "text.json", "--json").json | {"model": ""}
    said = f"only the text part (text_config, {case}) is read; left out: vision_config"
    assert ran.err == f"moesaic: {tmp_path / 'config.json'}: {said}\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "seer", "text_config": {"model_type": "reader"}}, "unknown model_type 'reader'.*qwen3_next"),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba"]}, "no hidden_size"),
        (TINY["granitemoehybrid"] | {"model_type": "granitemoehybrid", "layer_types": ["conv"]}, "'conv'.*mamba, att"),
        (NEMOTRON | {"hybrid_override_pattern": "MX"}, "'X'.*attention, mlp, moe"),
        (NEMOTRON | {"hybrid_override_pattern": None}, "is None; it must list"),
    ],
)
def test_what_cannot_be_counted_is_one_line(moesaic, tmp_path, fields, message):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ran = moesaic("count", tmp_path)
    assert (ran.exit_code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith(f"moesaic: error: {tmp_path / 'config.json'}: ") and re.search(message, ran.err)


def test_every_preset_and_dtype():
    for name, dtype in zip(families.presets(), cycle(["fp32", "bf16", "fp16", "fp8", "int8", "int4"]), strict=False):
        document = describe(name, families.find_preset(name), dtype=dtype)
        assert json.loads(json.dumps(document)) == document
        assert 0 < document["active_gemm"] <= document["active_all"] <= document["total"]


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["mixtral-8x7"], "mixtral-8x7b"),
        (["/nowhere/at-all"], "/nowhere/at-all"),
        ([], "--all"),
        (["mixtral-8x7b", "--all"], "--all"),
        (["mixtral-8x7b", "--context", "0"], "--context 0"),
        (["mixtral-8x7b", "--dtype", "fp7"], "fp32"),
        (["mixtral-8x7b", "--plot", "field.svg"], "add --all"),
    ],
)
def test_mistakes(moesaic, arguments, seen):
    ran = moesaic("count", *arguments)
    assert (ran.exit_code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("moesaic: error: ")
    assert seen in ran.err
