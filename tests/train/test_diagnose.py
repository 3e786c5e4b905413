import pytest
import torch

from moesaic.train.diagnose import first_nonfinite
from tests.tiny import lively, tiny_config


@pytest.fixture
def model():
    return lively(tiny_config(windows=(3, None, 5), router="sigmoid_topk", selection_bias=True, shared=True))


def tokens():
    return torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))


def spoil(tensor, value=float("nan")):
    with torch.no_grad():
        tensor.view(-1)[0] = value


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("embedding.weight", "nan", "embedding: weight weight is nan"),
        ("layers.1.attention.k_proj.weight", "inf", "layers.1.attention.k_proj: weight weight is inf"),
        ("layers.0.attention_norm.weight", "-inf", "layers.0.attention_norm: weight weight is inf"),
        ("layers.1.feed_forward.router.weight", "nan", "layers.1.feed_forward.router: weight weight is nan"),
        ("layers.1.feed_forward.router.selection_bias", "nan", "router: buffer selection_bias is nan"),
        ("layers.0.feed_forward.experts.gate_up", "nan", "layers.0.feed_forward.experts: weight gate_up is nan"),
        ("layers.0.feed_forward.shared_experts.down_proj.weight", "nan", "shared_experts.down_proj: weight"),
        ("final_norm.weight", "nan", "final_norm: weight weight is nan"),
        ("head.weight", "nan", "the head: weight is nan"),
    ],
)
def test_a_broken_weight_is_named(model, name, value, said):
    spoil(model.state_dict()[name], float(value))
    assert said in first_nonfinite(model, tokens())


def test_the_first_of_several_is_named(model):
    for name in ("head.weight", "layers.1.attention.q_proj.weight", "layers.0.feed_forward.experts.down"):
        spoil(model.state_dict()[name])
    assert first_nonfinite(model, tokens()) == "layers.0.feed_forward.experts: weight down is nan"


def test_an_output_that_overflows_is_named(model):
    with torch.no_grad():
        model.layers[1].attention.v_proj.weight.fill_(3e38)
    assert first_nonfinite(model, tokens(), torch.zeros(2, 9)) == "layers.1.attention.v_proj: output is inf"


def test_router_logits_that_overflow_are_named(model):
    with torch.no_grad():
        model.layers[0].feed_forward.router.weight.fill_(3e38)
    assert "layers.0.feed_forward.router: output is" in first_nonfinite(model, tokens())


def test_an_expert_that_nobody_reached_is_named(model):
    """Behind hooks too: experts may be computed without calling them as a module."""
    experts = model.layers[0].feed_forward.experts
    experts.compute = lambda x_TD, rows: torch.zeros_like(x_TD)
    spoil(experts.down)
    assert first_nonfinite(model, tokens()) == "layers.0.feed_forward.experts: weight down is nan"
    experts.compute = lambda x_TD, rows: x_TD + experts.down.sum()
    assert first_nonfinite(model, tokens()) == "layers.0.feed_forward.experts: weight down is nan"


def test_gradients_are_named_from_the_loss_backward(model):
    model(tokens()).sum().backward()
    assert first_nonfinite(model, tokens()) == "the loss: every weight, output and gradient is finite"
    spoil(model.layers[0].attention.q_proj.weight.grad)
    spoil(model.layers[1].feed_forward.experts.down.grad, float("inf"))
    assert first_nonfinite(model, tokens()) == "the gradient of layers.1.feed_forward.experts.down is inf"
    model.final_norm.weight.grad_buffer = torch.full((20,), float("nan"))
    assert first_nonfinite(model, tokens()) == "the gradient of final_norm.weight is nan"


def test_nothing_is_left_behind(model):
    spoil(model.layers[0].feed_forward.experts.down)
    first_nonfinite(model, tokens())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
