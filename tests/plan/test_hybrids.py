"""Models that are described and not run: hybrids with states of fixed size, and others."""

import json

import pytest

from moesaic.config import AttentionConfig, ModelConfig, OutlinedModel, RecurrentConfig
from moesaic.errors import ConfigError
from moesaic.families import _counted
from moesaic.models.build import build
from moesaic.plan.flops import read_state_bytes
from moesaic.plan.formats import layer_state_bytes
from moesaic.plan.layout import Layout
from moesaic.plan.memory import cache_bytes, training_memory
from moesaic.plan.plan import ServingPlan, TrainingPlan, make_plan, read_model

NAMES = list(_counted.PRESETS)


def _states(config: ModelConfig) -> tuple[list[RecurrentConfig], list[AttentionConfig]]:
    parts = [layer.attention for layer in config.layers]
    return [p for p in parts if isinstance(p, RecurrentConfig)], [p for p in parts if isinstance(p, AttentionConfig)]


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_is_states_and_what_attention_keeps(name):
    plan = make_plan(name, context=4096, users=2)
    assert isinstance(plan, ServingPlan) and plan.fits
    recurrent, attention = _states(plan.serving.config)
    per_token = sum(2 * part.num_key_value_heads * part.head_dim * 2 for part in attention)
    fixed = sum(4 * part.state_size + 2 * part.conv_size for part in recurrent)
    assert fixed > 0 and plan.serving.config.state_bytes_per_token() == per_token
    held = cache_bytes(plan.serving.config, plan.serving.formats, 4096, 2, Layout())
    assert held == 2 * (4096 * per_token + fixed)
    assert cache_bytes(plan.serving.config, plan.serving.formats, 8192, 2, Layout()) - held == 2 * 4096 * per_token


def test_figures_of_a_release_worked_by_hand():
    """Qwen3-Next: 36 layers whose 32 heads keep 128 times 128 numbers, and 3 inputs of 8,192 channels; 12 attend."""
    _, config = read_model("qwen3-next-80b-a3b")
    assert config.state_bytes(1) - config.state_bytes_per_token() == 36 * (4 * 32 * 128 * 128 + 2 * 3 * 8192)
    assert config.state_bytes_per_token() == 12 * 2 * 2 * 256 * 2
    assert config.flops_per_token(1000) - config.flops_per_token(0) == 12 * 4 * 16 * 256 * 1000
    assert config.flops_per_token(0) == 2 * config.active_gemm + 36 * 7 * 32 * 128 * 128
    recurrent = _states(config)[0][0]
    assert read_state_bytes(recurrent, 9, "fp8") == 2 * layer_state_bytes(recurrent, 9, "int8")
    assert layer_state_bytes(recurrent, 0, "bf16") == 0


def test_a_step_of_a_hybrid_hardly_grows_with_the_context():
    short, long = (make_plan("nemotron-3-nano-30b-a3b", machine="h200", users=64, context=n) for n in (1024, 131_072))
    other = [make_plan("qwen3-30b-a3b", machine="h200", users=2, context=n) for n in (1024, 40_960)]
    assert isinstance(short, ServingPlan) and isinstance(long, ServingPlan)
    assert long.decode.seconds < 2.5 * short.decode.seconds
    assert isinstance(other[0], ServingPlan) and isinstance(other[1], ServingPlan)
    assert other[1].decode.seconds > other[0].decode.seconds


@pytest.mark.parametrize("name", NAMES)
def test_spread_over_devices_every_tensor_is_somewhere(name):
    _, config = read_model(name)
    one, eight = (
        make_plan(config, machine="8xh200", layout=layout, users=8)
        for layout in (Layout(dp=8, ep=8), Layout(tp=2, dp=4, ep=8))
    )
    assert isinstance(one, ServingPlan) and isinstance(eight, ServingPlan)
    assert eight.memory.parts["weights: attention"] < one.memory.parts["weights: attention"]
    assert eight.memory.parts["weights: experts"] == one.memory.parts["weights: experts"]


@pytest.mark.parametrize("name", NAMES)
def test_they_can_be_planned_for_training(name):
    plan = make_plan(name, machine="64xh200", task="train")
    assert isinstance(plan, TrainingPlan) and plan.step_s > 0
    kept = training_memory(plan.run.config, plan.run.training, plan.run.machine.device, plan.run.layout)
    assert kept.parts["activations"] > 0
    json.dumps(plan.to_dict())


def test_nothing_builds_what_is_only_described():
    _, config = read_model("qwen3-next-80b-a3b")
    assert isinstance(config, OutlinedModel)
    with pytest.raises(ConfigError, match="qwen3_next model is described for counts and plans"):
        build(config, device="meta")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def _folder(tmp_path, fields):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def test_an_unknown_architecture_lists_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"'qwen4_next'; did you mean 'qwen3_next'\? Known: .*jamba.*mixtral"):
        make_plan(_folder(tmp_path, {"model_type": "qwen4_next"}))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "bf16"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}}, "mxfp4"),
    ],
)
def test_of_models_for_more_than_text_the_text_part_is_planned(tmp_path, fields, name):
    text = _counted.PRESETS["qwen3.5-35b-a3b"].config | fields
    plan = make_plan(_folder(tmp_path, {"model_type": "seer", "text_config": text}))
    assert isinstance(plan, ServingPlan)
    assert plan.serving.formats.name == name and plan.serving.config.total == 34_660_610_688


def test_a_packing_that_is_not_known_asks_for_one(tmp_path):
    packed = {"quantization_config": {"quant_method": "hqq", "bits": 4}}
    folder = _folder(tmp_path, _counted.PRESETS["jamba-v0.1"].config | packed)
    with pytest.raises(ConfigError, match=r"'hqq' is not supported.*--format, such as int4-128"):
        make_plan(folder)
    plan = make_plan(folder, format="int4-128")
    assert isinstance(plan, ServingPlan) and plan.serving.formats.name == "int4-128"
