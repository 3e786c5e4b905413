"""Granite's multipliers where nobody looks at logits: the loss, and its gradient at head and embedding."""

import dataclasses

import pytest
import torch

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.errors import ConfigError
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingTape
from moesaic.train.loss import losses

RAW = {
    "model_type": "granitemoe",
    "vocab_size": 61,
    "hidden_size": 20,
    "intermediate_size": 7,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_local_experts": 5,
    "max_position_embeddings": 32,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}


def lively(config: ModelConfig) -> Decoder:
    model = Decoder(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.3, generator=generator)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_the_trainers_loss_is_that_of_the_logits(tied: bool) -> None:
    model = lively(families.from_hf(RAW | {"tie_word_embeddings": tied}))
    ids_BS = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(2))
    inputs_BS, targets_BS = ids_BS[:, :-1], ids_BS[:, 1:]
    seen = losses(model, inputs_BS, targets_BS, (), RoutingTape()).cross_entropy
    expected = torch.nn.functional.cross_entropy(model(inputs_BS).flatten(0, 1), targets_BS.flatten())
    assert seen.item() == pytest.approx(expected.item(), rel=1e-12)
    parameters = [model.embedding.weight, model.head_weight, model.final_norm.weight]
    for ours, theirs in zip(
        torch.autograd.grad(seen, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_multipliers_are_where_they_belong() -> None:
    """Each by what it must do to a model that is otherwise the same."""
    config = families.from_hf(RAW)
    ids_BS = torch.arange(7)[None]
    logits = lively(config)(ids_BS)
    undivided = lively(dataclasses.replace(config, logits_divisor=1.0))(ids_BS)
    assert torch.allclose(logits * 6, undivided, rtol=1e-12)
    model = lively(dataclasses.replace(config, embedding_multiplier=1.0))
    with torch.no_grad():
        assert model.head is not None
        model.embedding.weight.mul_(12.0)
    assert torch.allclose(model(ids_BS), logits, rtol=1e-12)


@pytest.mark.parametrize("name", ["embedding_multiplier", "residual_multiplier", "logits_scaling"])
def test_a_multiplier_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="it must be above 0 and finite"):
        families.from_hf(RAW | {name: 0.0})


def test_no_other_family_takes_them() -> None:
    config = families.from_hf(RAW)
    for family in ("mixtral", "moesaic"):
        with pytest.raises(ConfigError, match=f"cannot be written as {family}: "):
            families.to_hf(dataclasses.replace(config, family=family))
