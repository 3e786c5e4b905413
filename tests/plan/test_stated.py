"""Bits of weights, by what a config.json says of them."""

import pytest

from moesaic.errors import ConfigError
from moesaic.plan.stated import stated_formats

GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def packed(weights, **more):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups} | more


@pytest.mark.parametrize(
    ("described", "experts", "attention"),
    [
        (None, 16, 16),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2, 8 + 32 / 128**2),
        ({"quant_method": "fp8", "weight_block_size": [1, 32]}, 8.25, 8.25),
        ({"quant_method": "mxfp8"}, 8.25, 8.25),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, 4.25, 8 + 32 / 128**2),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, 4.25, 16),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, 4 + 20 / 128, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, 4.125, 4.125),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True}, 8, 8),
        ({"quant_method": "gptq", "bits": 3, "group_size": 64, "sym": True}, 3.25, 3.25),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8, 8),
        (packed(GROUP), 4.5, 4.5),
        (packed(GROUP, ignore=["re:.*self_attn.*", "lm_head"]), 4.5, 16),
        (packed(GROUP | {"type": "float", "group_size": 16}), 4.5, 4.5),
        (packed({"num_bits": 8, "type": "float", "strategy": "channel"}), 8 + 32 / 128**2, 8 + 32 / 128**2),
        ({"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}, 4.25, 16),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*self_attn*"]}, 4.5, 16),
    ],
)
def test_bits_of_a_weight(described, experts, attention):
    formats = stated_formats({"quantization_config": described} if described else {})
    assert (formats.of("experts").bits, formats.of("attention").bits) == pytest.approx((experts, attention))
    assert formats.of("embedding").bits == 16


def test_single_modules_left_alone_leave_no_role_alone():
    left = {"ignore": ["model.layers.0.mlp.experts.3.up_proj", "re:.*shared_experts.*"]}
    formats = stated_formats({"quantization_config": packed(GROUP, **left)})
    assert formats.by_role["experts"] == "int4" and formats.by_role["shared_experts"] == "bf16"


def test_of_a_text_part_the_whole_counts():
    inner = {"text_config": {"dtype": "bfloat16"}, "quantization_config": {"quant_method": "fp8"}}
    assert stated_formats(inner).name == "fp8" and stated_formats({"dtype": "float32"}).name == "fp32"


@pytest.mark.parametrize("described", [{"quant_method": "hqq"}, "fp8", {"quant_method": "gptq", "bits": 5}, packed({})])
def test_what_is_not_known_asks_for_a_format(described):
    with pytest.raises(ConfigError, match=r"--format, such as int4-128"):
        stated_formats({"quantization_config": described})


def test_one_matrix_of_latent_attention_is_not_all_of_attention():
    kept = ["lm_head", "model.layers.0.self_attn.kv_b_proj", "model.layers.0.mlp.gate"]
    described = {"quant_method": "moesaic-uneven4", "ignore": kept}
    assert stated_formats({"quantization_config": described}).name == "uneven4"
    described = {"quant_method": "moesaic-uneven4", "ignore": [*kept, "model.layers.0.self_attn.o_proj"]}
    assert "attention=" not in stated_formats({"quantization_config": described}).name
