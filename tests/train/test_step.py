"""One optimizer step: what it must not depend on, and what must not move when it fails."""

import dataclasses

import numpy as np
import pytest
import torch

from moesaic.config import StackConfig
from moesaic.config.capacity import CapacityConfig
from moesaic.data.loader import Batch
from moesaic.errors import MissingDependencyError, NonFiniteError
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.train import compilation
from moesaic.train.step import Stepper
from moesaic.train.twins import dense_twin
from tests.tiny import lively, tiny_config
from tests.train.step_helpers import (
    BIASED,
    MOE,
    batch,
    changed,
    cut,
    differences,
    lively_stepper,
    state_of,
    stepper,
)

IGNORED = -100  # as torch.nn.functional.cross_entropy has it


def collected(trained):
    """Copies of every weight's gradient so far."""
    found = {}
    for weight in trained.optimizer.weights:
        gradient = trained.optimizer.gradients.of(weight)
        assert gradient is not None, weight.name
        found[weight.name] = gradient.clone()
    return found


def gradients(settings, micro_batches, config=MOE):
    """What one step would move the weights by, kept from being used up."""
    trained = lively_stepper(settings, config)
    found = {}

    def keep(step, learning_rate, norm):
        found.update(collected(trained))

    trained.optimizer.step = keep
    return found, trained.run(0, micro_batches)


def assert_near(first, second, tolerance):
    scale = max(gradient.abs().max() for gradient in first.values())
    for name, gradient in first.items():
        assert (gradient - second[name]).abs().max() < tolerance * scale, name


@pytest.mark.parametrize("num_parts", [2, 4, 8])
def test_micro_batches_change_no_gradient(num_parts):
    """Neither the loss's nor the balance's: transformers' Trainer multiplies the latter by the number of them."""
    settings, whole = changed(balance_losses=(("router_z", 0.1),)), batch(0, num_rows=8)
    first, result = gradients(settings, [whole])
    second, cut_result = gradients(settings, cut(whole, num_parts))
    assert_near(first, second, 2e-6)
    assert cut_result.loss == pytest.approx(result.loss, rel=1e-6)
    assert cut_result.balance["router_z"] == pytest.approx(result.balance["router_z"], rel=1e-6)


def test_a_balance_loss_that_is_no_mean_over_tokens_is_averaged_over_micro_batches():
    """Switch's multiplies two means; what must not happen is that its scale follows the number of micro-batches."""
    settings, parts = changed(balance_losses=(("switch", 1.0),)), cut(batch(0, num_rows=8), 4)
    together, result = gradients(settings, parts)
    alone = [gradients(settings, [part]) for part in parts]
    mean = {name: torch.stack([found[name] for found, _ in alone]).mean(0) for name in together}
    assert_near(mean, together, 2e-6)
    assert result.balance["switch"] == pytest.approx(np.mean([part.balance["switch"] for _, part in alone]), rel=1e-6)


def test_every_target_counts_the_same_however_unevenly_they_fall():
    """Targets that do not count make means over micro-batches differ from the mean over all."""
    settings, whole = changed(balance_losses=(("router_z", 0.1),)), batch(0, num_rows=8)
    whole.targets_BS[0, 3:] = IGNORED
    whole.targets_BS[1] = IGNORED
    whole.targets_BS[5, ::2] = IGNORED
    first, result = gradients(settings, [whole])
    second, cut_result = gradients(settings, cut(whole, 8))
    assert_near(first, second, 2e-6)
    assert cut_result.loss == pytest.approx(result.loss, rel=1e-6)
    uneven = [Batch(*(array[rows] for array in whole)) for rows in (slice(0, 1), slice(1, 6), slice(6, 8))]
    assert_near(first, gradients(settings, uneven)[0], 2e-6)


def test_bf16_adds_micro_batches_up_in_fp32():
    """Near the fp32 gradient of the same rounded weights; sums of 16 bf16 gradients in bf16 would be far worse."""
    settings, parts = changed(precision="bf16", balance_losses=()), cut(batch(0, num_rows=16), 16)
    found, _ = gradients(settings, parts)
    alone = [gradients(settings, [part])[0] for part in parts]
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        mean = torch.stack([part[name].double() for part in alone]).mean(0)
        assert (gradient - mean).abs().max() <= 2**-8 * mean.abs().max() + 1e-7, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns_a_batch_by_heart(precision, optimizer):
    trained = stepper(changed(precision=precision, optimizer=optimizer, steps=25))
    results = [trained.run(step, [batch(0)]) for step in range(25)]
    assert results[-1].loss < 0.6 * results[0].loss
    assert results[0].loss == pytest.approx(np.log(61), rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_layers_give_the_same_bits(precision):
    plain = stepper(changed(precision=precision), BIASED)
    recomputed = stepper(changed(precision=precision, recompute="layers"), BIASED)
    for step in range(3):
        first, second = (
            trained.run(step, cut(batch(step), 2), LoadRecorder.for_model(BIASED, num_domains=2))
            for trained in (plain, recomputed)
        )
        assert first.load is not None and second.load is not None
        assert first.load.to_json() == second.load.to_json()
    assert differences(state_of(plain), state_of(recomputed)) == []


def test_recording_changes_no_bit():
    alone, recorded = stepper(config=BIASED), stepper(config=BIASED)
    recorder = LoadRecorder.for_model(BIASED, num_domains=2)
    for step in range(3):
        assert alone.run(step, cut(batch(step), 2)).load is None
        load = recorded.run(step, cut(batch(step), 2), recorder).load
        assert load is not None and load.step == step + 1
        assert load.layers[0].counts_E.sum() == 4 * 16 * 2
        by_domain = load.layers[0].domain_counts_ME
        assert by_domain is not None and (by_domain.sum(0) == load.layers[0].counts_E).all()
    assert differences(state_of(alone), state_of(recorded)) == []


def test_selection_biases_move_once_a_step_by_the_whole_step_s_load():
    trained = stepper(changed(selection_bias_rate=((0, 0.25), (10, 0.0)), balance_losses=()), BIASED)
    result = trained.run(0, cut(batch(0), 4), LoadRecorder.for_model(BIASED, num_domains=2))
    bias = trained.model.get_buffer("layers.0.feed_forward.router.selection_bias")
    assert result.load is not None and result.selection_bias_rate == 0.25
    counts = torch.from_numpy(result.load.layers[0].counts_E).float()
    assert torch.equal(bias, 0.25 * torch.sign(counts.mean() - counts))
    before = bias.clone()
    trained.run(10, [batch(1)])
    assert torch.equal(bias, before)


def test_coefficients_follow_their_points():
    settings = changed(balance_losses=(("switch", ((0, 0.1), (10, 0.0))), ("router_z", 0.5)))
    trained = stepper(settings)
    assert trained.run(5, [batch(0)]).coefficients == {"switch": 0.05, "router_z": 0.5}
    off = trained.run(12, [batch(0)])
    assert off.coefficients["switch"] == 0.0 and off.balance["switch"] > 0.9


def test_a_dense_model_has_no_balance():
    result = stepper(config=dense_twin(MOE, "active")).run(0, [batch(0)])
    assert result.balance == result.coefficients == {}


def test_outside_of_a_step_the_model_is_a_plain_one():
    trained = stepper(changed(precision="bf16"))
    trained.run(0, [batch(0)])
    for name, parameter in trained.model.named_parameters():
        assert parameter.grad is None and not vars(parameter), name
        assert not parameter._post_accumulate_grad_hooks, name


def test_documents_see_only_themselves_where_asked():
    documents = batch(0)
    documents.document_ids_BS[:, 7:] = 1
    apart, together = lively_stepper(), Stepper(lively(MOE), changed(), document_attention=False)
    whole = lively_stepper().run(0, [batch(0)])
    assert together.run(0, [documents]).loss == whole.loss
    assert apart.run(0, [documents]).loss != pytest.approx(whole.loss, rel=1e-4)


def broken(trained, name, value=float("nan")):
    with torch.no_grad():
        trained.model.get_parameter(name).view(-1)[-1] = value
    return trained


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loss_that_is_not_a_number_moves_nothing(precision, optimizer):
    trained = stepper(changed(precision=precision, optimizer=optimizer, ema_decay=0.9), BIASED)
    trained.run(0, [batch(0)])
    before = state_of(broken(trained, "final_norm.weight"))
    with pytest.raises(NonFiniteError, match=r"the loss is nan at step 5; lower train\.learning_rate") as caught:
        trained.run(4, [batch(1), batch(2)])
    assert (caught.value.step, caught.value.what, caught.value.micro_batch) == (4, "loss", 0)
    assert differences(before, state_of(trained)) == []


def _is_finite(gradient):
    return gradient is not None and bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_moves_nothing_and_can_be_looked_at(precision, monkeypatch):
    """The loss is fine; a weight's gradient overflows. The step after it does not remember."""
    trained = stepper(changed(precision=precision), BIASED)
    twin = stepper(changed(precision=precision), BIASED)
    before = state_of(trained)
    name = "layers.1.attention.o_proj.weight"
    hook = trained.model.get_parameter(name).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"the gradient norm is (nan|inf) at step 1;") as caught:
        trained.run(0, [batch(0)])
    hook.remove()
    assert caught.value.micro_batch is None
    assert differences(before, state_of(trained)) == []
    shown = {n for n, parameter in trained.model.named_parameters() if not _is_finite(parameter.grad)}
    assert shown == {name}
    trained.run(0, [batch(0)])
    twin.run(0, [batch(0)])
    assert differences(state_of(trained), state_of(twin)) == []


def test_a_weight_without_gradient_stays():
    """As in torch.optim: no gradient, no decay, no step count."""
    trained = lively_stepper()
    model, gradients_ = trained.model, trained.optimizer.gradients
    with gradients_.collecting():
        model.embedding.weight.sum().backward()
        assert {w.name for w in gradients_.weights if gradients_.of(w) is not None} == {"embedding.weight"}
        before = state_of(trained)
        trained.optimizer.step(0, 0.1, gradients_.norm())
    changed_names = differences(before, state_of(trained))
    assert {name.partition("|")[0] for name in changed_names} == {"embedding.weight"}


def test_buffers_hold_what_autograd_and_kernels_bring():
    """Over two backward passes, with a weight used twice (a tied head) and in both precisions."""
    config = tiny_config(windows=(None, None), tied=True)
    for precision in ("fp32", "bf16"):
        trained = lively_stepper(changed(precision=precision), config)
        tokens = torch.arange(20).view(2, 10)
        with trained.optimizer.gradients.collecting():
            for _ in range(2):
                trained.model(tokens).logsumexp(-1).sum().backward()
            found = collected(trained)
        trained.model(tokens).logsumexp(-1).sum().backward()
        rounding = 2**-8 if precision == "bf16" else 1e-6
        for name, parameter in trained.model.named_parameters():
            assert parameter.grad is not None
            assert_near({name: found[name]}, {name: 2 * parameter.grad.float()}, rounding)


def test_no_compiler_is_said_clearly(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(MissingDependencyError, match=r"train\.compile=true needs a C\+\+ compiler"):
        compilation.compiled(lambda: None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns about itself while it traces
@pytest.mark.parametrize(
    ("precision", "capacity"), [("fp32", None), ("bf16", None), ("fp32", CapacityConfig(factor=0.5))]
)
def test_compiled_training_is_near_the_eager_one(precision, capacity):
    settings = changed(precision=precision, balance_losses=(("switch", 0.01), ("router_z", 0.01)))
    config = tiny_config(windows=(None,), router="sigmoid_topk", selection_bias=True)
    moe = dataclasses.replace(config.layers[0].feed_forward, capacity=capacity)
    config = dataclasses.replace(
        config, decoder=StackConfig(layers=(dataclasses.replace(config.layers[0], feed_forward=moe),))
    )
    eager = Stepper(lively(config), settings)
    compiled = Stepper(lively(config), dataclasses.replace(settings, compile=True))
    for step in range(3):
        parts = cut(batch(step), 2)
        first, second = (trained.run(step, parts) for trained in (eager, compiled))
        tolerance = 1e-4 if precision == "fp32" else 3e-2
        assert second.loss == pytest.approx(first.loss, rel=tolerance)
        assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=10 * tolerance)
