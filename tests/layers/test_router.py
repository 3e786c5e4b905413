import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from moesaic.config import HashSettings, ModelConfig, MoeConfig, NullSettings, RouterConfig, StackConfig
from moesaic.config.router import ROUTER_KINDS
from moesaic.hub import load, save
from moesaic.layers.moe import MoeLayer
from moesaic.layers.router import RouterLayer
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingTape, TokenFacts
from moesaic.routing.routers import hash_table
from moesaic.train.recompute import recompute_layers
from tests.tiny import tiny_config

HIDDEN, EXPERTS, TOKENS, VOCAB = 6, 5, 40, 61


def router_config(name, top_k=2, **fields):
    kind = ROUTER_KINDS[name]
    own = {"hash": HashSettings(vocab_size=VOCAB, weight="sigmoid"), "null_topk": NullSettings(num_null_experts=2)}
    top_k = EXPERTS if name == "dense" else kind.top_k or top_k
    return RouterConfig(name=name, num_experts=EXPERTS, top_k=top_k, settings=own.get(name), **fields)


def router_layer(name, **fields):
    config = router_config(name, **fields)
    layer = RouterLayer(config, HIDDEN)
    torch.manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    if layer.table is not None:
        layer.table.copy_(hash_table(config))
    return layer


def tokens(count=TOKENS):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, HIDDEN, generator=generator), TokenFacts(torch.arange(count) % VOCAB)


def model_config(router) -> ModelConfig:
    config = tiny_config(windows=(None, 5, None))
    layers = tuple(
        replace(layer, feed_forward=replace(layer.feed_forward, router=router))
        if isinstance(layer.feed_forward, MoeConfig)
        else layer
        for layer in config.layers
    )
    return replace(config, decoder=StackConfig(layers=layers))


# --- its tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"batch_norm": True}])
@pytest.mark.parametrize("name", list(ROUTER_KINDS))
def test_a_router_has_the_tensors_that_its_description_names(name, extra):
    config = router_config(name, selection_bias=ROUTER_KINDS[name].ranks_scores, **extra)
    layer = RouterLayer(config, HIDDEN)
    specs = list(config.tensors("router", HIDDEN))
    found = layer.state_dict(prefix="router.")
    assert list(found) == [spec.name for spec in specs]
    assert {spec.name for spec in specs if spec.is_parameter} == {f"router.{n}" for n, _ in layer.named_parameters()}
    for spec in specs:
        assert found[spec.name].shape == spec.shape
        assert str(found[spec.name].dtype) == f"torch.{spec.dtype or 'float32'}"


def test_a_hash_router_without_learned_weights_learns_nothing():
    config = RouterConfig(name="hash", num_experts=EXPERTS, top_k=2, settings=HashSettings(vocab_size=VOCAB))
    layer = RouterLayer(config, HIDDEN)
    layer.get_buffer("table").copy_(hash_table(config))
    x_TD, facts = tokens()
    decision = layer(x_TD, facts)
    assert not list(layer.parameters()) and decision.router_weight_ED is None
    assert decision.logits_TE.tolist() == [[0.0] * EXPERTS] * TOKENS
    assert decision.rows.weights_R.unique().tolist() == [0.5]


@pytest.mark.parametrize("move", [lambda layer: layer.to(torch.bfloat16), lambda layer: layer.half()])
def test_what_no_gradient_reaches_stays_fp32(move):
    """Steps of 1e-3 vanish in bf16."""
    layer = router_layer("sigmoid_topk", selection_bias=True, batch_norm=True)
    with torch.no_grad():
        layer.get_buffer("selection_bias").fill_(0.2503)
    move(layer)
    assert layer.get_parameter("weight").dtype in (torch.bfloat16, torch.float16)
    assert layer.get_buffer("selection_bias").tolist() == torch.full((EXPERTS,), 0.2503).tolist()
    assert layer.get_buffer("running_var").dtype == torch.float32
    assert layer.double().get_buffer("selection_bias").dtype == torch.float64


def test_new_models_start_routers_where_they_say():
    def started(name, **fields):
        state = Decoder(model_config(router_config(name, **fields))).initialize(3).state_dict()
        return {
            name.removeprefix("layers.1.feed_forward.router."): value
            for name, value in state.items()
            if name.startswith("layers.1.feed_forward.router.")
        }

    noisy = started("noisy_topk")
    assert not noisy["weight"].any() and not noisy["noise_weight"].any()
    assert 0.01 < started("softmax_topk")["weight"].std() < 0.03
    assert started("relu")["penalty_coefficient"].tolist() == pytest.approx([1e-8])
    normalised = started("sigmoid_topk", batch_norm=True, selection_bias=True)
    assert normalised["running_mean"].tolist() == normalised["selection_bias"].tolist() == [0.0] * EXPERTS
    assert normalised["running_var"].tolist() == [1.0] * EXPERTS
    assert torch.equal(started("hash")["table"], hash_table(router_config("hash")))


# --- what is drawn or measured while training -------------------------------------------------------------------------


def test_jitter_multiplies_the_input_while_training_only():
    layer = router_layer("softmax_topk", jitter=0.1)
    x_TD, facts = torch.ones(4000, HIDDEN), TokenFacts()
    with torch.no_grad():
        layer.get_parameter("weight").copy_(torch.eye(EXPERTS, HIDDEN))  # the logits are the input
    drawn = layer.train()(x_TD, facts).logits_TE
    assert drawn.min() >= 0.9 and drawn.max() <= 1.1
    # Uniform: mean 1, deviation 0.1 / sqrt(3); five standard errors of each.
    assert abs(drawn.mean() - 1) < 5 * 0.0577 / math.sqrt(drawn.numel())
    assert abs(drawn.std() / (0.1 / math.sqrt(3)) - 1) < 5 / math.sqrt(drawn.numel())
    assert torch.equal(layer.eval()(x_TD, facts).logits_TE, torch.ones(4000, EXPERTS))


# Sinkhorn evens out what equal tokens get until experts are tied, and rounding decides which of them are chosen.
@pytest.mark.parametrize(
    "name", [name for name, kind in ROUTER_KINDS.items() if kind.picks_top_k and name != "sinkhorn"]
)
def test_gating_dropout_draws_experts_alike_and_weighs_them_by_the_router(name):
    """One input for all tokens, so large that what a router draws itself changes no choice."""
    layer, plain = router_layer(name, gating_dropout=0.25), router_layer(name)
    for each in (layer, plain):
        if each.noise_weight is not None:
            torch.nn.init.zeros_(each.noise_weight)
    x_D = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(5)) * 50
    x_TD, facts = x_D.expand(8000, HIDDEN), TokenFacts()
    own = plain.train()(x_TD, facts).rows.choices()
    assert (own == own[0]).all()
    rows = layer.train()(x_TD, facts).rows
    ids = rows.choices()
    assert all(len(set(row)) == len(row) for row in (row[row >= 0].tolist() for row in ids[:500]))
    for expert, count in enumerate(ids[:, 0].add(1).bincount(minlength=EXPERTS + 1)[1:].tolist()):
        share = 0.25 / EXPERTS + 0.75 * (own[0, 0] == expert)
        assert abs(count - 8000 * share) < 5 * math.sqrt(8000 * share * (1 - share))
    dictated = plain(x_TD, facts, rows)
    if name not in ("noisy_topk", "sparsemixer"):  # which draw part of their weights
        assert torch.equal(dictated.rows.weights_R, rows.weights_R)
    assert torch.equal(layer.eval()(x_TD, facts).rows.choices(), plain.eval()(x_TD, facts).rows.choices())


def test_batch_normalised_logits_are_those_of_torchs_batch_norm():
    layer = router_layer("softmax_topk", batch_norm=True).train()
    weight_ED, mean, var = layer.get_parameter("weight"), torch.zeros(EXPERTS), torch.ones(EXPERTS)
    facts = TokenFacts(mask_T=torch.arange(TOKENS) % 3 > 0)
    batches = [torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(n)) * 3 + 1 for n in range(3)]
    for x_TD in batches:
        logits_TE = torch.nn.functional.linear(x_TD, weight_ED)[facts.mask_T]
        wanted = torch.nn.functional.batch_norm(logits_TE, mean, var, training=True)
        assert torch.allclose(layer(x_TD, facts).logits_TE[facts.mask_T], wanted, atol=1e-5)
    assert torch.allclose(layer.get_buffer("running_mean"), mean, atol=1e-6)
    assert torch.allclose(layer.get_buffer("running_var"), var, rtol=1e-5)
    wanted = torch.nn.functional.batch_norm(torch.nn.functional.linear(batches[-1], weight_ED), mean, var)
    assert torch.allclose(layer.eval()(batches[-1], facts).logits_TE, wanted, atol=1e-5)


def test_running_means_move_once_and_in_training_only():
    layer = router_layer("softmax_topk", batch_norm=True).train()
    x_TD, facts = tokens()
    decision = layer(x_TD, facts)
    moved = layer.get_buffer("running_mean").clone()
    assert moved.abs().min() > 0
    layer(x_TD, facts, decision.rows)  # a recomputation
    with torch.no_grad():
        layer(x_TD, facts)  # counting what a whole batch will choose
    layer(x_TD, TokenFacts(mask_T=torch.zeros(TOKENS, dtype=torch.bool)))  # nothing but padding
    layer.eval()(x_TD, facts)
    assert torch.equal(layer.get_buffer("running_mean"), moved)


def test_replayed_rows_move_no_running_means():
    config = MoeConfig(router=router_config("softmax_topk", batch_norm=True), intermediate_size=3)
    layer = MoeLayer(config, HIDDEN, 0).train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    tape = RoutingTape()
    x_BSD = tokens()[0][None]
    layer(x_BSD, tape=tape)
    moved = layer.get_buffer("router.running_mean").clone()
    rows = tape.decisions[0].rows
    layer(x_BSD, tape=RoutingTape(replay={0: rows}))
    assert torch.equal(layer.get_buffer("router.running_mean"), moved)


def test_gradients_through_batch_statistics():
    layer = router_layer("softmax_topk", batch_norm=True).double().train()
    x_TD, facts = tokens(7)
    assert torch.autograd.gradcheck(lambda x: layer(x, facts).scores_TE, x_TD.double().requires_grad_())


# --- recomputation ----------------------------------------------------------------------------------------------------


def extras(name) -> dict[str, Any]:
    kind = ROUTER_KINDS[name]
    wanted = {"jitter": 0.1, "batch_norm": True}
    wanted |= {"selection_bias": True} if kind.ranks_scores else {}
    return wanted | ({"gating_dropout": 0.3} if kind.picks_top_k else {})


@pytest.mark.parametrize("name", list(ROUTER_KINDS))
def test_recomputed_layers_give_the_same_bits(name):
    """In training mode, with all that is drawn and measured there, and padding."""
    model = Decoder(model_config(router_config(name, **extras(name)))).initialize(1).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.2)
    ids = torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 9:] = mask[2, :] = False

    def run(model):
        torch.manual_seed(4)
        tape = RoutingTape()
        x_BSD = model.hidden(ids, mask, tape=tape)
        loss = x_BSD[mask].square().mean() + sum(d.scores_TE[:, 0].mean() for d in tape.decisions.values())
        loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return loss.detach(), found, dict(model.named_buffers()), torch.rand(1)

    other = copy.deepcopy(model)
    loss, gradients, buffers, drawn = run(model)
    with recompute_layers(other):
        loss_again, gradients_again, buffers_again, drawn_again = run(other)
    assert torch.equal(loss, loss_again) and torch.equal(drawn, drawn_again)
    assert gradients.keys() == gradients_again.keys()
    assert "layers.0.feed_forward.router.weight" in gradients
    for of_one, of_other in ((gradients, gradients_again), (buffers, buffers_again)):
        for key, value in of_one.items():
            assert torch.equal(value, of_other[key]), key


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ROUTER_KINDS))
def test_files_bring_back_every_tensor_and_the_same_routing(name, tmp_path):
    fields = {"selection_bias": ROUTER_KINDS[name].ranks_scores, "batch_norm": True}
    config = replace(model_config(router_config(name, **fields)), family="moesaic")
    model = Decoder(config, dtype=torch.bfloat16).initialize(1).eval()
    save(model, tmp_path)
    again = load(tmp_path).eval()
    assert again.config == config
    for key, value in model.state_dict().items():
        found = again.state_dict()[key]
        assert found.dtype == value.dtype and torch.equal(found, value), key
    assert all(found.dtype != torch.bfloat16 for _, found in again.named_buffers())
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    assert torch.equal(again(ids), model(ids))
