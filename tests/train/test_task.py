"""Encoder-decoders in the one trainer: they learn from their sources, padding counts nowhere, a stop changes no bit."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.data.sourced import IGNORED_TARGET, SourcedBatch
from moesaic.errors import ConfigError, DataError, MoesaicError
from moesaic.evaluate.targets import target_loss
from moesaic.models.encoder_decoder import EncoderDecoder
from moesaic.routing import RoutingTape
from moesaic.train.loop import Trainer
from moesaic.train.loss import losses
from moesaic.train.micro_batches import tensors_of
from moesaic.train.muon import Muon
from moesaic.train.optimizer import AdamW
from moesaic.train.recipe import DataSettings, Recipe
from moesaic.train.resume import RunFolder
from moesaic.train.step import Stepper
from tests.train.sourced_run import PACKED, SPANS, TRANSLATION, first_batch, logits_of, pairs, switch, trainer
from tests.train.tiny_run import CONFIG, changed, seed_everything, state_of

TASKS = ["span_corruption", "translation"]
EXAMPLES = Path(__file__).parents[2] / "examples"
LOUD = [("switch", 0.1)]


@pytest.mark.parametrize(("task", "steps"), [("span_corruption", 60), ("translation", 40)])
def test_it_learns(task, steps):
    run = trainer(task, changed(steps=steps, batch_size=8, warmup_steps=5, evaluate_every=steps))
    history = run.train()
    before, after = history.evaluations[0].loss, history.evaluations[-1].loss
    assert after.bits_per_byte < 0.9 * before.bits_per_byte
    assert set(after.by_domain) == ({"ones", "threes"} if task == "span_corruption" else {"up-down", "down-up"})
    layers = [layer.layer for layer in history.steps[-1].load.layers]
    assert layers == [1, 3]  # one of the encoder and one of the decoder
    encoder, decoder = history.steps[-1].load.layers
    assert encoder.num_tokens != decoder.num_tokens
    assert encoder.domain_counts_ME is not None and encoder.domain_counts_ME.sum() == encoder.counts_E.sum()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(tmp_path, task, stop):
    """A router that draws, inner dropout, a background writer, an average of weights: everything comes back."""
    settings = changed(checkpoint_every=1, ema_decay=0.9, micro_batches=2, keep_best=1)
    seed_everything()
    whole = trainer(task, settings)
    history = whole.train()
    with RunFolder.claim(tmp_path / "run") as folder:
        seed_everything()
        trainer(task, settings, run=folder, stop_after=stop).train()
        seed_everything(99)
        resumed = trainer(task, settings, run=folder)
        assert resumed.resume()
        rest = resumed.train()
    assert state_of(resumed) == state_of(whole)
    assert [report.loss for report in rest.steps] == [report.loss for report in history.steps[stop:]]
    assert [report.tokens for report in rest.steps] == [report.tokens for report in history.steps[stop:]]
    assert rest.evaluations[-1].loss == history.evaluations[-1].loss


def test_recomputing_changes_no_bit():
    settings = changed(balance_losses=LOUD, steps=3)
    plain = trainer("translation", settings)
    thrifty = trainer("translation", dataclasses.replace(settings, recompute="layers"))
    seed_everything()
    plain.train()
    seed_everything()
    thrifty.train()
    assert state_of(plain) == state_of(thrifty)


def padded(batch: SourcedBatch, by: int) -> SourcedBatch:
    """The same batch with more padding at the ends, of tokens that would show."""

    def wider(array: np.ndarray, fill: int) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, by)), constant_values=fill)

    return SourcedBatch(
        wider(batch.inputs_BS, 7),
        wider(batch.targets_BS, IGNORED_TARGET),
        batch.domain_ids_B,
        wider(batch.document_ids_BS, -1),
        wider(batch.source_ids_BM, 9),
        np.pad(batch.source_mask_BM, ((0, 0), (0, by))),
    )


def calm() -> EncoderDecoder:
    """A model that neither draws nor drops, so that two batches can be compared."""
    config = switch(dropout_rate=0.0, router_jitter_noise=0.0, expert_capacity=64)
    return EncoderDecoder(config).initialize(0)


@pytest.mark.parametrize("balance", ["switch", "router_z", "entropy"])
def test_padding_counts_nowhere(balance):
    batch = first_batch()
    found = []
    for each in (batch, padded(batch, 5)):
        model, tensors = calm(), tensors_of(each, True)
        parts = losses(
            model,
            tensors.inputs_BS,
            tensors.targets_BS,
            [(balance, 0.1)],
            RoutingTape(),
            mask_BS=tensors.mask_BS,
            source=tensors.source,
        )
        parts.total.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        found.append((parts.cross_entropy, parts.penalty, gradients))
    (loss, penalty, gradients), (padded_loss, padded_penalty, padded_gradients) = found
    torch.testing.assert_close(padded_loss, loss)
    torch.testing.assert_close(padded_penalty, penalty)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("balance", ["router_z", "global_exact"])
def test_how_a_step_is_cut_does_not_matter(balance):
    """Also where sources and targets are of other lengths in every part: encoder and decoder have their own shares."""
    whole = first_batch()
    parts = [SourcedBatch(*(array[rows] for array in whole)) for rows in (slice(0, 1), slice(1, 4))]
    results, states = [], []
    for micro_batches in ([whole], parts):
        stepper = Stepper(calm(), changed(balance_losses=[(balance, 0.3)]))
        results.append(stepper.run(3, micro_batches))
        states.append({name: weight.detach().clone() for name, weight in stepper.model.named_parameters()})
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)
    assert results[1].balance == pytest.approx(results[0].balance, rel=1e-5)
    assert results[1].gradient_norm == pytest.approx(results[0].gradient_norm, rel=1e-4)
    assert results[1].num_tokens == results[0].num_tokens
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, atol=1e-4, rtol=1e-3, msg=name)


def test_the_given_language_is_not_scored():
    batch = first_batch()
    model, tensors = calm().eval(), tensors_of(batch, True)
    logits = logits_of(model, batch)
    scored = torch.from_numpy(batch.targets_BS) >= 0
    expected = torch.nn.functional.cross_entropy(logits[scored], torch.from_numpy(batch.targets_BS)[scored])
    parts = losses(
        model,
        tensors.inputs_BS,
        tensors.targets_BS,
        (),
        RoutingTape(),
        mask_BS=tensors.mask_BS,
        source=tensors.source,
    )
    torch.testing.assert_close(parts.cross_entropy, expected)
    assert not scored[:, 0].any() and scored[:, 1].all()


def test_held_out_loss_is_over_the_bytes_of_the_targets():
    batch, lengths, model = first_batch(), np.arange(80), calm()
    loss = target_loss(model, {"a": [batch]}, lengths).by_domain["a"]
    assert model.training
    logits, targets = logits_of(model, batch), torch.from_numpy(batch.targets_BS)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    num_bytes = lengths[batch.targets_BS[batch.targets_BS >= 0]].sum()
    assert loss == pytest.approx(float(nats) / np.log(2) / num_bytes, rel=1e-5)


def test_wrong_sources_cost_a_model_that_reads_them():
    run = trainer("translation", changed(steps=3))
    right, wrong = run.task.held_out_loss(run.model, 64), run.task.misled_loss(run.model, 64)
    assert wrong is not None and wrong.by_domain != right.by_domain
    assert Trainer(*causal()).task.misled_loss(calm(), 64) is None


def causal():
    from moesaic.models.decoder import Decoder

    return Decoder(CONFIG).initialize(0), changed(), PACKED


@pytest.mark.parametrize(
    ("model", "task", "words"),
    [
        ({"model_type": "switch_transformers", "d_model": 20}, "causal", "has an encoder; set data.task to"),
        ({"model_type": "llama", "hidden_size": 20}, "span_corruption", "llama has no encoder; use data.task='causal'"),
    ],
)
def test_models_of_the_wrong_kind(model, task, words):
    recipe = Recipe(model=model | small(model), data=DataSettings(task=task))
    with pytest.raises(ConfigError, match=words):
        recipe.model_config(80, 0)


def small(model):
    if model["model_type"] == "llama":
        return {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    return {"d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 2}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_relative_biases_are_moved_as_biases(optimizer):
    """A table that nothing is multiplied by: no matrix for Muon, and no weight decay."""
    stepper = Stepper(calm(), changed(optimizer=optimizer))
    rules = stepper.optimizer.rules
    biases = [name for name in rules if "relative_bias" in name]
    assert biases == ["layers.0.attention.relative_bias.weight", "layers.2.attention.relative_bias.weight"]
    for name in biases:
        rule = rules[name]
        assert isinstance(rule, AdamW) and rule.weight_decay == 0
    assert isinstance(rules["layers.0.attention.q_proj.weight"], Muon if optimizer == "muon" else AdamW)


@pytest.mark.parametrize("name", TASKS)
def test_the_examples_are_recipes(name):
    recipe = Recipe.from_toml(EXAMPLES / f"{name}.toml", [])
    config = recipe.model_config(recipe.vocab_size, 0)
    assert recipe.data.task == name
    assert len(config.moe_layers) == 2 and config.total < 3e6


def test_texts_of_the_wrong_kind():
    model = EncoderDecoder(switch()).initialize(0)
    with pytest.raises(ConfigError, match="learns from pairs of texts, and this is text"):
        Trainer(model, changed(), PACKED, data=TRANSLATION)
    with pytest.raises(ConfigError, match="learns from text, and these are pairs"):
        Trainer(model, changed(), pairs(), data=SPANS)
    bare = dataclasses.replace(PACKED, sentinel_ids=())
    with pytest.raises(DataError, match="the vocabulary has 0"):
        Trainer(model, changed(), bare, data=SPANS)


def test_what_is_not_finite_is_named(tmp_path):
    run = trainer("span_corruption")
    with torch.no_grad():
        run.model.get_parameter("layers.2.cross_attention.k_proj.weight").fill_(float("nan"))
    with pytest.raises(MoesaicError, match=r"layers\.2\.cross_attention\.k_proj"):
        run.train()
