"""The balance loss of each layer, weighed by its share of the step."""

import copy
import inspect
from typing import Any

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moesaic.errors import ConfigError
from moesaic.hub.transformers import balance_loss, correct_balance_loss
from tests.hub.transformers.tiny import tiny_model, tokens


def collapsed(expert, num_tokens=12, num_experts=4):
    """Router logits of a layer that sends all tokens to one expert."""
    return torch.nn.functional.one_hot(torch.full((num_tokens,), expert), num_experts).float() * 50


def test_layers_that_collapse_onto_different_experts_do_not_cancel_out():
    layers: Any = tuple(collapsed(expert) for expert in range(4))
    assert float(load_balancing_loss_func(layers, 4, 1)) == pytest.approx(1.0)  # as if balanced
    assert float(balance_loss(layers, 4, 1)) == pytest.approx(4.0)


def test_one_layer_is_as_transformers_has_it_with_and_without_padding():
    logits = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 4)
    mask[0, 2:] = 0
    for attention_mask in (None, mask):
        theirs = load_balancing_loss_func((logits,), 6, 2, attention_mask)
        assert torch.allclose(balance_loss((logits,), 6, 2, attention_mask), torch.as_tensor(theirs), rtol=1e-6)


def model_with_loss():
    return correct_balance_loss(tiny_model(output_router_logits=True, router_aux_loss_coef=0.5))


@torch.no_grad()
def test_a_micro_batch_counts_by_its_share_of_the_steps_targets():
    model, ids = model_with_loss(), tokens()
    whole = model(ids, labels=ids)
    targets = ids[:, 1:].numel()
    entropy = whole.loss - 0.5 * whole.aux_loss
    assert float(entropy) == pytest.approx(float(tiny_model()(ids, labels=ids).loss))
    part = model(ids, labels=ids, num_items_in_batch=4 * targets)
    assert float(part.loss) == pytest.approx(float(whole.loss) / 4)
    assert float(part.aux_loss) == pytest.approx(float(whole.aux_loss))


@torch.no_grad()
def test_a_corrected_model_is_otherwise_the_model():
    plain, model, ids = tiny_model(output_router_logits=True), model_with_loss(), tokens()
    assert model is correct_balance_loss(model)
    assert type(model).__name__ == type(plain).__name__ and isinstance(model, type(plain))
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert model.router_aux_loss_coef == 0.5
    answer = model(ids, return_dict=False)
    assert isinstance(answer, tuple) and torch.equal(answer[1], plain(ids).logits)
    copied = copy.deepcopy(model)
    assert float(copied(ids, labels=ids).loss) == pytest.approx(float(model(ids, labels=ids).loss))


def test_models_without_a_balance_loss_are_refused():
    with pytest.raises(ConfigError, match="output_router_logits = True"):
        correct_balance_loss(tiny_model())
    with pytest.raises(ConfigError, match="has no balance loss"):
        correct_balance_loss(tiny_model(output_router_logits=True).model)
    with pytest.raises(ConfigError, match="no layers"):
        balance_loss((), 4, 1)
