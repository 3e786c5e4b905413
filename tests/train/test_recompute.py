import copy
import gc
import weakref

import pytest
import torch

from moesaic.kernels import ops
from moesaic.routing import RoutingTape
from moesaic.routing.balancers import mean_over_layers
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.train.loss import linear_cross_entropy
from moesaic.train.recompute import recompute_layers
from tests.tiny import lively, tiny_config

CONFIGS = {
    "softmax": tiny_config(windows=(3, None, 5, None)),
    "sigmoid, bias, shared": tiny_config(
        windows=(3, None, 5, None), router="sigmoid_topk", selection_bias=True, shared=True
    ),
}


@pytest.fixture(params=CONFIGS.values(), ids=list(CONFIGS))
def model(request):
    return lively(request.param).train()


def tokens(seed=1):
    return torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(seed))


def loss_of(model, tape=None):
    tape = tape or RoutingTape()
    documents = torch.tensor([[0] * 8 + [1] * 12, [0] * 20, [0] * 3 + [1] * 17])
    x_TD = model.hidden(tokens(), tape=tape, document_ids_BS=documents).flatten(0, 1)
    loss = linear_cross_entropy(x_TD, model.head_weight, tokens(2).flatten())
    if tape.decisions:
        loss = loss + sum(mean_over_layers(name, tape.decisions.values()) for name in ("switch", "sequence"))
    return loss


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_loss_and_gradients_are_the_same_bits(model):
    expected_loss = loss_of(model)
    expected_loss.backward()
    expected = gradients(model)
    with recompute_layers(model):
        loss = loss_of(model)
        loss.backward()
    assert torch.equal(loss, expected_loss)
    assert_equal(gradients(model), expected)


def test_choices_are_replayed_though_the_bias_has_moved(monkeypatch):
    model = lively(CONFIGS["sigmoid, bias, shared"]).train()
    loss_of(model).backward()
    expected = gradients(model)
    select, calls = ops.select_topk, []
    monkeypatch.setattr(ops, "select_topk", lambda *given: calls.append(0) or select(*given))
    handle = recompute_layers(model)
    loss = loss_of(model)
    num_choices = len(calls)
    before = RoutingTape()
    with torch.no_grad():
        model.hidden(tokens(), tape=before)
        for layer in model.config.moe_layers:
            bias = model.get_buffer(f"layers.{layer}.feed_forward.router.selection_bias")
            bias += torch.tensor([5.0, -5.0, 5.0, -5.0, 0.0])
        after = RoutingTape()
        model.hidden(tokens(), tape=after)
    assert not torch.equal(before.decisions[0].rows.counts_E, after.decisions[0].rows.counts_E)
    assert len(calls) == num_choices + 2 * len(model.config.moe_layers)
    loss.backward()
    assert len(calls) == num_choices + 2 * len(model.config.moe_layers)
    handle.remove()
    assert_equal(gradients(model), expected)


def test_listeners_hear_once(model):
    recorder, plain = LoadRecorder.for_model(model.config), LoadRecorder.for_model(model.config)
    loss_of(model, plain).backward()
    with recompute_layers(model):
        loss_of(model, recorder).backward()
    assert recorder.finish_step().to_json() == plain.finish_step().to_json()


@pytest.mark.parametrize("how", ["replay", "choices"])
def test_a_tape_still_dictates(model, how):
    other = RoutingTape()
    with torch.no_grad():
        model.hidden(tokens(7), tape=other)
    rows = {layer: decision.rows for layer, decision in other.decisions.items()}
    for router in (model.layers[layer].feed_forward.router for layer in rows):
        router.weight.requires_grad_(how == "choices")  # dictated weights leave it nothing to learn
    loss_of(model, RoutingTape(**{how: rows})).backward()
    expected = gradients(model)
    with recompute_layers(model):
        loss_of(model, RoutingTape(**{how: rows})).backward()
    assert_equal(gradients(model), expected)


def kept_bytes(model):
    """What the layers keep for the backward pass: saved tensors, and the inputs that recomputation holds instead."""
    kept = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def pack_input(_, given):
        pack(given[0])

    inputs = [layer.register_forward_pre_hook(pack_input) for layer in model.layers]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x_BSD = model.hidden(tokens())
    for hook in inputs:
        hook.remove()
    del x_BSD
    return sum(kept.values())


def test_layers_keep_little(model):
    whole = kept_bytes(model)
    with recompute_layers(model):
        kept = kept_bytes(model)
    assert kept < whole / 5


def test_evaluation_and_caches_go_the_plain_way(model, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("recomputed")

    monkeypatch.setattr("moesaic.train.recompute.checkpoint", refuse)
    with recompute_layers(model):
        with torch.no_grad():
            model(tokens())
        model.eval()
        model(tokens())
        model.train()
        with pytest.raises(AssertionError, match="recomputed"):
            model(tokens())
    model(tokens())


def test_a_copy_recomputes_its_own_layers_and_names_stay(model):
    names = list(model.state_dict())
    with recompute_layers(model):
        twin = copy.deepcopy(model)
        assert list(model.state_dict()) == names
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(loss_of(twin), loss_of(model))
    loss_of(twin).backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_forward_without_a_backward_leaves_nothing_behind(model):
    tape = RoutingTape()
    with recompute_layers(model):
        loss = loss_of(model, tape)
    left = weakref.ref(tape)
    del tape, loss
    gc.collect()
    assert left() is None
