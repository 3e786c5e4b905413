"""What the trainer says of balancing, and what it refuses."""

import dataclasses
import json
import math

import pytest
import torch

from moesaic.config import MoeConfig, SoftMoeConfig
from moesaic.config.router import RouterConfig
from moesaic.errors import ConfigError, NonFiniteError
from moesaic.models.decoder import Decoder
from moesaic.train.balance import running_statistics
from moesaic.train.recipe import Recipe, TrainSettings
from moesaic.train.resume import RunFolder
from tests.train.step_helpers import BIASED, batch, changed, stepper
from tests.train.tiny_run import CONFIG, trainer
from tests.train.tiny_run import changed as run_settings


def routed_by(name, **fields):
    layers = [
        dataclasses.replace(
            layer,
            feed_forward=dataclasses.replace(
                layer.feed_forward, router=RouterConfig(name=name, num_experts=4, top_k=2, **fields)
            ),
        )
        if isinstance(layer.feed_forward, MoeConfig)
        else layer
        for layer in CONFIG.layers
    ]
    return dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, layers=tuple(layers)))


def softly_mixed():
    soft = SoftMoeConfig(num_experts=4, slots_per_expert=2, intermediate_size=5)
    layers = tuple(dataclasses.replace(layer, feed_forward=soft) for layer in CONFIG.layers)
    return dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, layers=layers))


def test_the_cost_of_the_first_pass_is_said_and_recorded(tmp_path):
    said = []
    settings = run_settings(balance_losses=(("global_exact", 0.01),), micro_batches=2)
    with RunFolder.claim(tmp_path / "run") as folder:
        run = trainer(settings, run=folder)
        run.say = said.append
        history = run.train()
        lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < report.first_pass_s < report.seconds for report in history.steps)
    assert all(line["first_pass_s"] > 0 for line in lines)
    (words,) = [text for text in said if "global_exact" in text]
    assert words.startswith("counting choices before each step (global_exact) took ")
    plain = trainer(run_settings(balance_losses=(("global_running", 0.01),), micro_batches=2)).train()
    assert all(report.first_pass_s == 0 for report in plain.steps)


@pytest.mark.parametrize("name", ["expert_choice", "soft"])
def test_what_sees_the_future_is_named_once(name):
    said = []
    config = softly_mixed() if name == "soft" else routed_by(name)
    run = trainer(run_settings(balance_losses=()), config=config)
    run.say = said.append
    run.train()
    (words,) = [text for text in said if "future" in text]
    part = "Soft MoE" if name == "soft" else "router 'expert_choice'"
    assert words.startswith(f"{part}: what a token gets depends on later ones")
    quiet = trainer(run_settings())
    quiet.say = said.append
    quiet.train()
    assert len(said) == 1


def test_a_recipe_whose_losses_do_not_fit_its_routers_is_refused():
    model = {
        "model_type": "qwen3_moe",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "intermediate_size": 16,
    }
    fits = Recipe(model=model, train=TrainSettings(balance_losses=(("sequence", 0.1), ("entropy", 0.1))))
    assert fits.model_config(64, None).moe_layers
    for name, reason in (("load", "ranks without noise"), ("device", "in no groups")):
        recipe = Recipe(model=model, train=TrainSettings(balance_losses=((name, 0.1),)))
        with pytest.raises(ConfigError, match=reason):
            recipe.model_config(64, None)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_biases_stay_fp32_and_move_by_the_rule_that_was_asked_for(rule):
    settings = changed(
        precision="bf16", selection_bias_rule=rule, selection_bias_centered=True, selection_bias_rate=1e-3
    )
    trained = stepper(settings, BIASED)
    biases = [buffer for name, buffer in trained.model.named_buffers() if "selection_bias" in name]
    before = [bias.clone() for bias in biases]
    trained.run(0, [batch(0)])
    for bias, start in zip(biases, before, strict=True):
        assert bias.dtype == torch.float32
        moved = bias - start
        assert moved.abs().max() > 1e-5 and abs(float(moved.sum())) < 1e-8
        assert (len(moved.unique()) > 3) == (rule == "proportional")
    with pytest.raises(ConfigError, match="selection_bias_rule='signum'; it must be one of"):
        changed(selection_bias_rule="signum")


def test_evaluation_moves_nothing_that_balances():
    run = trainer(run_settings(), config=routed_by("sigmoid_topk", selection_bias=True))
    assert isinstance(run.model, Decoder)
    before = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    run.evaluate()
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in run.model.named_buffers())


def test_a_broken_step_leaves_running_statistics_as_they_were():
    trained = stepper(changed(), routed_by("softmax_topk", batch_norm=True))
    trained.run(0, [batch(0)])
    statistics = running_statistics(trained.model)
    before = [buffer.clone() for buffer in statistics]
    with torch.no_grad():
        trained.model.get_parameter("final_norm.weight").fill_(math.nan)
    with pytest.raises(NonFiniteError):
        trained.run(1, [batch(1)])
    assert before and all(torch.equal(buffer, old) for buffer, old in zip(statistics, before, strict=True))


def test_every_coefficient_has_its_curve(tmp_path):
    settings = run_settings(balance_losses=(("switch", ((0, 0.2), (2, 0.0))),), selection_bias_rate=0.5)
    with RunFolder.claim(tmp_path / "run") as folder:
        trainer(settings, run=folder).train()
        lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["coefficient/switch"] for line in lines][:3] == pytest.approx([0.2, 0.1, 0.0])
    assert {line["selection_bias_rate"] for line in lines} == {0.5}
