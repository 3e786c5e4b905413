"""Balancing is the same however a step is cut: into micro-batches, over ranks, padded, packed, recomputed. In fp64."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from moesaic.config import ModelConfig, MoeConfig
from moesaic.config.capacity import CapacityConfig
from moesaic.config.router import GroupConfig, ReluSettings, RouterConfig
from moesaic.errors import ConfigError
from moesaic.models.decoder import route
from moesaic.routing.balancers import BALANCE_LOSSES
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.train.micro_batches import tensors_of
from moesaic.train.step import Stepper
from tests.parallel.gloo import on_ranks
from tests.tiny import lively
from tests.train.invariance import (
    CONFIG,
    EXACT,
    Steps,
    batch_of,
    cut,
    difference,
    one_step,
    ratio,
    router_of,
    rows,
    settings_of,
    without_targets,
)

ROUNDING = 1e-11


@functools.cache
def whole():
    """The step in one piece."""
    return one_step(settings_of(*EXACT), [batch_of(rows("right"))])


def with_router(**fields) -> ModelConfig:
    """CONFIG with another router."""
    layers = [
        dataclasses.replace(
            layer, feed_forward=dataclasses.replace(layer.feed_forward, router=RouterConfig(num_experts=6, **fields))
        )
        if isinstance(layer.feed_forward, MoeConfig)
        else layer
        for layer in CONFIG.layers
    ]
    return dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, layers=tuple(layers)))


def assert_same(found):
    wanted = whole()
    assert difference(found["gradients"], wanted["gradients"]) < ROUNDING
    assert ratio(found["gradients"], wanted["gradients"]) == pytest.approx(1.0, abs=1e-9)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=ROUNDING)
    assert found["balance"] == pytest.approx(wanted["balance"], rel=ROUNDING)
    assert found["counts"] == wanted["counts"] and found["num_tokens"] == wanted["num_tokens"]
    for name, bias in wanted["biases"].items():
        assert torch.equal(found["biases"][name], bias), name


@pytest.mark.parametrize("layout", ["right", "left", "packed", "empty"])
def test_cutting_padding_and_packing_change_nothing(layout):
    for num_parts in (1, 2, 4, 8):
        if len(rows(layout)) % num_parts == 0:
            assert_same(one_step(settings_of(*EXACT), cut(rows(layout), num_parts)))


def test_micro_batches_of_different_sizes_change_nothing():
    uneven = [batch_of(rows("right")[part]) for part in (slice(0, 1), slice(1, 6), slice(6, 8))]
    assert_same(one_step(settings_of(*EXACT), uneven))


def test_recomputing_changes_nothing():
    settings = settings_of(*EXACT, recompute="layers")
    for layout, num_parts in (("right", 1), ("right", 4), ("packed", 2)):
        assert_same(one_step(settings, cut(rows(layout), num_parts)))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_change_nothing(size):
    """Each rank has every size-th row, in one micro-batch, in two, and in as many as it has rows."""
    runs = [(settings_of(*EXACT), num_parts) for num_parts in sorted({1, 2, 8 // size})]
    found = on_ranks(size, "tests.train.invariance:on_rank", Steps(rows("right"), runs))
    for steps in found:
        for step in steps:
            assert_same(step)
    for first, other in zip(found[0], found[1], strict=True):  # to the bit: ranks must not drift apart
        assert all(torch.equal(first["gradients"][name], other["gradients"][name]) for name in first["gradients"])


def test_these_tests_can_see_a_loss_that_depends_on_the_cut():
    """Switch's, micro-batch by micro-batch, is another loss; the same data is needed to say so."""
    uncut, four = (one_step(settings_of("switch"), cut(rows("right"), parts))["gradients"] for parts in (1, 4))
    assert difference(four, uncut) > 1e-3


def test_counting_the_step_so_far_stays_within_its_bound():
    """|running - exact| <= E * sum_m s_m * max_i |f_i so far - f_i|, as sum_i P_i = 1; s_m are shares of tokens.

    With n micro-batches of one size, f so far is m / n of the step, so the right side is at most
    E * (n - 1) / (2 n) times the largest difference between a share so far and one of what is still to come.
    """
    parts = cut(rows("right"), 4)
    alone = [one_step(settings_of("switch"), [part]) for part in parts]
    shares = np.array([part["num_tokens"][0] for part in alone]) / whole()["num_tokens"][0]
    bound = 0.0
    for layer in range(2):
        so_far = np.cumsum([part["counts"][layer] for part in alone], axis=0)
        distance = np.abs(so_far / so_far.sum(1, keepdims=True) - so_far[-1] / so_far[-1].sum()).max(1)
        bound += 5 * (shares * distance).sum() / 2
    running = one_step(settings_of("global_running"), parts)["balance"]["global_running"]
    distance = abs(running - whole()["balance"]["global_exact"])
    assert 0 < distance <= bound < 1
    print(f"running {running:.4f}, exact {whole()['balance']['global_exact']:.4f}, bound {bound:.4f}")


def test_one_micro_batch_is_a_step_so_far():
    running = one_step(settings_of("global_running"), cut(rows("right"), 1))
    exact = one_step(settings_of("global_exact"), cut(rows("right"), 1))
    assert difference(running["gradients"], exact["gradients"]) == 0.0
    assert running["balance"]["global_running"] == exact["balance"]["global_exact"]
    assert exact["first_pass_s"] == 0.0


GROUPED = with_router(name="softmax_topk", top_k=2, groups=GroupConfig(num_groups=3, top_groups=2, score="max"))
RELU = with_router(name="relu", top_k=2, settings=ReluSettings(start=0.5))


@pytest.mark.parametrize("name", sorted(set(BALANCE_LOSSES) - {"load"}))  # whose noise differs in each micro-batch
def test_identical_micro_batches_in_any_number_keep_a_loss_s_scale(name):
    """transformers' Trainer makes 2.0 of 2 micro-batches, and 4.0 of 4."""
    config = RELU if name == "relu_sparsity" else GROUPED
    part = batch_of(without_targets(rows("right")))
    once = one_step(settings_of(name), [part], config=config)
    for number in (2, 3):
        found = one_step(settings_of(name), [part] * number, config=config)
        assert ratio(found["gradients"], once["gradients"]) == pytest.approx(1.0, abs=1e-9)
        assert difference(found["gradients"], once["gradients"]) < ROUNDING
        assert found["balance"] == pytest.approx(once["balance"], rel=ROUNDING)


@pytest.mark.parametrize("name", sorted(set(BALANCE_LOSSES)))
def test_a_coefficient_multiplies_the_gradient_of_its_loss(name):
    """And so it is not dropped on the way."""
    noisy = with_router(name="noisy_topk", top_k=2)
    config = {"relu_sparsity": RELU, "load": noisy, "importance": noisy}.get(name, GROUPED)
    part = batch_of(without_targets(rows("right")))
    once, thrice = (one_step(settings_of(name, coefficient=c), [part], config=config) for c in (0.1, 0.3))
    router = "layers.0.feed_forward.router.weight"
    assert once["gradients"][router].abs().max() > 1e-6
    assert ratio(thrice["gradients"], once["gradients"]) == pytest.approx(3.0, rel=1e-9)


NOISY = {
    "noisy_topk": {"top_k": 2},
    "gshard_top2": {"top_k": 2},
    "switch": {"top_k": 1, "jitter": 0.3},
    "softmax_topk": {"top_k": 2, "batch_norm": True, "gating_dropout": 0.5},
}


@pytest.mark.parametrize(("name", "recompute"), [*((name, "none") for name in sorted(NOISY)), ("noisy_topk", "layers")])
def test_the_first_pass_foresees_what_noisy_routers_will_choose(name, recompute, monkeypatch):
    """And leaves random numbers and buffers as they were."""
    config = with_router(name=name, **NOISY[name])
    seen = {}
    first_pass = Stepper._first_pass

    def keep(self, step, micro_batches):
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        seen["counts"], seconds = first_pass(self, step, micro_batches)
        assert all(torch.equal(buffer, before[name]) for name, buffer in self.model.named_buffers())
        return seen["counts"], seconds

    monkeypatch.setattr(Stepper, "_first_pass", keep)
    parts = cut(rows("right"), 2)
    found = one_step(settings_of("global_exact", recompute=recompute), parts, config=config)
    assert [counts_E.tolist() for counts_E in seen["counts"].values()] == found["counts"]
    assert found["first_pass_s"] > 0
    plain = one_step(settings_of(recompute=recompute), parts, config=config)
    unweighted = one_step(settings_of("global_exact", coefficient=0.0, recompute=recompute), parts, config=config)
    assert difference(unweighted["gradients"], plain["gradients"]) == 0.0


def test_only_steps_move_biases():
    model = lively(CONFIG).double()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tokens_BS = torch.from_numpy(batch_of(rows("right")).inputs_BS)
    for training in (True, False):
        model.train(training)(tokens_BS).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_bias_moves_in_the_right_direction_whatever_is_padded():
    """Down where more was chosen than the mean of real tokens' choices, up where less."""
    for rule in ("sign", "proportional"):
        for layout in ("left", "empty"):
            settings = settings_of(selection_bias_rule=rule, selection_bias_rate=0.01)
            found = one_step(settings, cut(rows(layout), 2))
            start = dict(lively(CONFIG).named_buffers())
            for (name, bias), counts in zip(found["biases"].items(), found["counts"], strict=True):
                moved = np.sign((bias - start[name].double()).numpy())
                assert (moved == np.sign(np.mean(counts) - np.array(counts))).all()


def with_capacity(**fields) -> ModelConfig:
    layers = [
        dataclasses.replace(
            layer, feed_forward=dataclasses.replace(layer.feed_forward, capacity=CapacityConfig(factor=0.5, **fields))
        )
        if isinstance(layer.feed_forward, MoeConfig)
        else layer
        for layer in CONFIG.layers
    ]
    return dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, layers=tuple(layers)))


def violation(model, batch):
    """How far the heaviest expert of the first layer is above the mean, nothing dropped and no padding counted."""
    tensors = tensors_of(batch, True)
    counts_E = route(model.eval(), tensors.inputs_BS, tensors.mask_BS)[0].counts_E.double()
    return float(counts_E.max() / counts_E.mean() - 1)


@pytest.mark.parametrize("fields", [{}, {"pad": True}, {"overflow": "next_best"}, {"drop": "probability"}], ids=str)
def test_biases_even_out_what_is_chosen_though_most_of_it_is_dropped(fields):
    """Two experts have all tokens, and slots for few. Counted after dropping, loads would look even: a frozen bias."""
    part = batch_of(rows("left"))
    settings = settings_of(selection_bias_rate=((0, 0.25), (20, 0.02)), learning_rate=1e-9)
    trained = Stepper(lively(with_capacity(**fields)), settings)
    bias = router_of(trained.model, 0).get_buffer("selection_bias")
    bias.copy_(torch.tensor([3.0, 3.0, 0.0, 0.0, 0.0]))
    assert violation(trained.model, part) == pytest.approx(1.5)
    result = trained.run(0, [part, part], LoadRecorder.for_model(trained.model.config))
    assert bias.tolist() == pytest.approx([2.75, 2.75, 0.25, 0.25, 0.25])
    assert result.load is not None and result.load.layers[0].counts_E.sum() < 2 * 2 * result.load.layers[0].num_tokens
    for step in range(1, 30):
        trained.run(step, [part])
    assert violation(trained.model, part) < 0.25


def test_a_relu_penalty_moves_once_a_step_and_multiplies_its_loss():
    parts = cut(rows("right"), 4)
    trained = Stepper(lively(RELU), settings_of("relu_sparsity", coefficient=2.0))
    penalties = [router_of(trained.model, layer).get_buffer("penalty_coefficient") for layer in (0, 1)]
    for penalty, start in zip(penalties, (0.5, 0.25), strict=True):
        penalty.fill_(start)
    result = trained.run(0, parts, LoadRecorder.for_model(RELU))
    assert result.coefficients["relu_sparsity"] == pytest.approx(2.0 * (0.5 + 0.25) / 2)
    assert result.load is not None
    for penalty, start, load in zip(penalties, (0.5, 0.25), result.load.layers, strict=True):
        too_many = load.counts_E.sum() > 2 * load.num_tokens
        assert penalty.item() == pytest.approx(start * (1.2 if too_many else 1 / 1.2))
    before = [penalty.clone() for penalty in penalties]
    Stepper(trained.model, settings_of("router_z")).run(1, parts)
    assert all(torch.equal(penalty, start) for penalty, start in zip(penalties, before, strict=True))


def test_what_does_not_fit_the_model_is_refused_before_training():
    with pytest.raises(
        ConfigError, match='the balance loss "load" with router "sigmoid_topk", which ranks without noise'
    ):
        Stepper(lively(CONFIG), settings_of("load"))


@pytest.mark.slow
def test_ranks_stay_the_same_to_the_bit_and_count_together():
    first, second = on_ranks(2, "tests.train.invariance:three_steps", rows("right"))
    assert all(torch.equal(tensor, second["state"][name]) for name, tensor in first["state"].items())
    assert first["losses"] == second["losses"] and first["norms"] == second["norms"]
    assert first["tokens"] == second["tokens"] == whole()["num_tokens"][0]


@pytest.mark.slow
def test_an_error_on_one_rank_is_one_on_all_and_nobody_waits():
    for rank in on_ranks(2, "tests.train.invariance:broken_ranks", rows("right")):
        assert rank["errors"][0] == "ranks with 4, 2 micro-batches; give every rank the same number"
        assert rank["errors"][1].startswith("the loss is nan at step 1")
        assert rank["moved"] == []
