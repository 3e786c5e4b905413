"""DeepSeek-V4: released schedules, spellings of its fields and tensors, and what is refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from moesaic import families
from moesaic.config import CompressedAttentionConfig, ModelConfig, MoeConfig, YarnConfig
from moesaic.errors import CheckpointError, ConfigError
from moesaic.hub import load, save
from tests.families.cases import COMMON, COMPRESSED
from tests.families.v4 import AHEAD, changed, folder_of

RAW = {"model_type": "deepseek_v4", **COMMON, **COMPRESSED}


def ratios(config: ModelConfig) -> list[int]:
    attentions = [layer.attention for layer in config.every_layer]
    assert all(isinstance(each, CompressedAttentionConfig) for each in attentions)
    return [each.compression.ratio if each.compression else 0 for each in attentions]  # pyright: ignore


def test_released_schedules() -> None:
    flash, pro = (families.find_preset(f"deepseek-v4-{name}") for name in ("flash", "pro"))
    assert ratios(flash) == [0, 0, *[4, 128] * 20, 4, 0] and len(flash.layers) == 43 and len(flash.mtp) == 1
    assert ratios(pro) == [128, 128, *[4, 128] * 29, 4, 0] and len(pro.layers) == 61 and len(pro.mtp) == 1
    for config in (flash, pro):
        moes = [each.feed_forward for each in config.every_layer]
        routers = [moe.router.name for moe in moes if isinstance(moe, MoeConfig)]
        assert routers == ["hash"] * 3 + ["sqrt_softplus_topk"] * (len(config.every_layer) - 3)
        for each in config.every_layer:
            attention = each.attention
            assert isinstance(attention, CompressedAttentionConfig)
            if attention.compression is None:
                assert (attention.rope.theta, attention.rope.scaling) == (1e4, None)
            else:
                assert attention.rope.theta == 1.6e5
                assert isinstance(attention.rope.scaling, YarnConfig) and attention.rope.magnitude == 1.0
                assert (attention.indexer is None) == (attention.compression.ratio == 128)


@pytest.mark.parametrize("name", ["deepseek-v4-flash", "deepseek-v4-pro"])
def test_what_is_written_means_the_same_to_transformers_as_what_is_released(name: str) -> None:
    ours: Any = AutoConfig.for_model(**families.to_hf(families.find_preset(name)))
    theirs: Any = AutoConfig.for_model(**families.presets()[name].config)
    differing = {field for field in theirs.to_dict() if getattr(ours, field) != getattr(theirs, field)}
    assert differing <= {"architectures", "rope_parameters"}
    seen, expected = (dict(DeepseekV4RotaryEmbedding(each).named_buffers()) for each in (ours, theirs))
    assert seen.keys() == expected.keys() and all(torch.equal(seen[name], expected[name]) for name in seen)
    rotation = DeepseekV4RotaryEmbedding(ours)
    assert rotation.main_attention_scaling == rotation.compress_attention_scaling == 1.0


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": None, "compress_ratios": [0, 2, 3]},
        {"layer_types": None, "compress_ratios": [0, 2, 3, 0, 0, 0]},
        {"compress_rates": None, "compress_rate_csa": 2, "compress_rate_hca": 3},
        {"num_hash_layers": None, "mlp_layer_types": ["hash_moe", "moe", "moe"]},
        {"qk_rope_head_dim": None, "partial_rotary_factor": 6 / 14},
        {"rope_theta": 1e4, "compress_rope_theta": 1.6e5, "rope_scaling": None},
        {
            "rope_theta": 5.0,  # what nobody reads beside the tables
            "rope_parameters": {
                "main": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 6 / 14},
                "compress": {"rope_type": "default", "rope_theta": 1.6e5, "partial_rotary_factor": 6 / 14},
            },
        },
        {"expert_dtype": "fp4", "topk_method": "noaux_tc", "n_shared_experts": 1, "norm_topk_prob": True},
    ],
)
def test_every_spelling_says_the_same(fields: dict[str, Any]) -> None:
    assert families.from_hf(RAW | fields) == families.from_hf(RAW)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": None}, "no compress_ratios and no layer_types; give one of 0, 3, 2 for each of 3 layers"),
        (
            {"layer_types": None, "compress_ratios": [0, 2]},
            r"compress_ratios=\[0, 2\]; give one of 0, 3, 2 for each",
        ),
        ({"compress_ratios": [0, 2, 128]}, r"compress_ratios=\[0, 2, 128\]; give one of 0, 3, 2 for each layer"),
        (
            {"layer_types": ["full_attention"] * 3},
            "layer_types=.*; give sliding_attention, compressed",
        ),
        ({"mlp_layer_types": ["moe", "dense", "moe"]}, "mlp_layer_types=.*; give hash_moe or moe for each of 3"),
        ({"num_hash_layers": -1}, "num_hash_layers=-1; it must be a whole number, 0 or more"),
        ({"compress_rates": {"sparse": 4}}, "compress_rates=.*; it must be a table of compressed_sparse_attention and"),
        ({"scoring_func": "relu"}, "scoring_func='relu' is not supported; known: 'sqrtsoftplus', 'sigmoid', 'softmax'"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False is not supported; known: True"),
        ({"n_shared_experts": 2}, "n_shared_experts=2 is not supported; known: 1"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 is not supported; known: 1"),
        ({"attention_bias": True}, "attention_bias=True is not supported; known: False"),
        ({"partial_rotary_factor": 0.5}, "qk_rope_head_dim=6 but partial_rotary_factor says 7|odd"),
        ({"hc_mult": 0}, "hc_mult=0; it must be a whole number above 0"),
        ({"o_groups": 4}, "num_heads=6 is not a multiple of output_groups=4; use one of"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\]; it must be a table"),
    ],
)
def test_what_cannot_be_expressed_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        families.from_hf(RAW | fields)


def test_streams_run_through_all_layers() -> None:
    config = families.from_hf(RAW)
    layers = (config.layers[0], dataclasses.replace(config.layers[1], hyper_connection=None), config.layers[2])
    with pytest.raises(ConfigError, match="hyper_connection differs between layers"):
        dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, layers=layers))
    with pytest.raises(ConfigError, match="hyper_connection differs between the model and its mtp layers"):
        dataclasses.replace(config, mtp=(layers[1],))
    with pytest.raises(ConfigError, match=r"residual_multiplier=0\.5 with hyper_connection"):
        dataclasses.replace(config.layers[0], residual_multiplier=0.5)


def test_saved_names_are_the_released_ones(made: Callable[[str], Any], tmp_path: Path) -> None:
    save(load(folder_of(made, AHEAD)), tmp_path / "ours")
    names = load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert {"embed.weight", "head.weight", "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale"} <= names
    inner = ("attn.kv_norm.weight", "attn.attn_sink", "attn.wo_a.weight", "ffn.experts.6.w2.weight", "hc_ffn_scale")
    assert {f"{layer}.{name}" for layer in ("layers.0", "layers.2", "mtp.0", "mtp.1") for name in inner} <= names
    sparse = ("compressor.ape", "compressor.wgate.weight", "compressor.norm.weight", "indexer.compressor.wkv.weight")
    assert {
        f"layers.1.attn.{name}" for name in (*sparse, "indexer.wq_b.weight", "indexer.weights_proj.weight")
    } <= names
    assert {"layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.bias", "mtp.0.ffn.gate.bias"} <= names
    assert {f"mtp.0.{name}.weight" for name in ("e_proj", "h_proj", "enorm", "hnorm", "norm")} <= names
    assert {"layers.1.ffn.gate.tid2eid", "layers.0.ffn.gate.bias", "mtp.0.ffn.gate.tid2eid"}.isdisjoint(names)
    assert not any(name.startswith("model.") for name in names)


def test_a_tensor_under_two_names_is_refused(made: Callable[[str], Any], tmp_path: Path) -> None:
    twice = changed(
        folder_of(made), tmp_path / "twice", lambda t: t.update({"norm.weight": t["model.norm.weight"] + 1})
    )
    with pytest.raises(CheckpointError, match=r"holds norm\.weight under two names, one of them"):
        load(twice)


def test_a_missing_expert_is_named(made: Callable[[str], Any], tmp_path: Path) -> None:
    lost = [f"model.layers.1.ffn.experts.4.w{part}.weight" for part in (1, 2, 3)]
    with pytest.raises(CheckpointError, match=r"lacks 3 of .* tensors .*: expert 4 of layer 1;"):
        load(changed(folder_of(made), tmp_path / "m", lambda t: [t.pop(name) for name in lost]))
