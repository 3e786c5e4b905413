"""The 1991 mixture against the paper's equations in plain Python, finite differences, and what it is for."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moesaic.errors import ConfigError
from moesaic.layers.mixture import OBJECTIVES, AdaptiveMixture, Mixture, gate_entropy, posterior

STEP = 1e-5


class Case:
    """One case in plain Python: outputs of each expert, logits of the gate, the target."""

    def __init__(self, num_experts, num_outputs, seed):
        draw = random.Random(seed)
        self.outputs = [[draw.gauss(0, 1) for _ in range(num_outputs)] for _ in range(num_experts)]
        self.logits = [draw.gauss(0, 1) for _ in range(num_experts)]
        self.target = [draw.gauss(0, 1) for _ in range(num_outputs)]

    def gates(self):
        total = sum(math.exp(a) for a in self.logits)
        return [math.exp(a) / total for a in self.logits]

    def squared(self):
        return [sum((d - o) ** 2 for d, o in zip(self.target, out, strict=True)) for out in self.outputs]

    def mean(self):
        return [
            sum(p * out[o] for p, out in zip(self.gates(), self.outputs, strict=True)) for o in range(len(self.target))
        ]

    def posterior(self):
        joint = [p * math.exp(-0.5 * s) for p, s in zip(self.gates(), self.squared(), strict=True)]
        return [j / sum(joint) for j in joint]

    def error(self, objective):
        pairs = list(zip(self.gates(), self.squared(), strict=True))
        if objective == "cooperative":
            return sum((d - m) ** 2 for d, m in zip(self.target, self.mean(), strict=True))
        if objective == "competitive":
            return sum(p * s for p, s in pairs)
        return -math.log(sum(p * math.exp(-0.5 * s) for p, s in pairs))

    def slope(self, objective, values, index):
        """dE by one number of `values`, by finite differences."""
        sides, before = [], values[index]
        for step in (STEP, -STEP):
            values[index] = before + step
            sides.append(self.error(objective))
        values[index] = before
        return (sides[0] - sides[1]) / (2 * STEP)

    def tensors(self):
        outputs = torch.tensor([self.outputs], dtype=torch.float64, requires_grad=True)
        logits = torch.tensor([self.logits], dtype=torch.float64, requires_grad=True)
        return Mixture(outputs, logits), torch.tensor([self.target], dtype=torch.float64)


def cases():
    return st.builds(Case, st.integers(1, 5), st.integers(1, 3), st.integers(0, 10_000))


@pytest.mark.parametrize("objective", ["cooperative", "competitive", "likelihood"])
@given(case=cases())
@settings(max_examples=25)
def test_the_error_and_both_of_its_gradients(objective, case):
    mixture, target = case.tensors()
    (error,) = OBJECTIVES[objective](mixture, target)
    assert error.item() == pytest.approx(case.error(objective), rel=1e-9)
    d_outputs, d_logits = torch.autograd.grad(error, mixture)
    for expert, outputs in enumerate(case.outputs):
        assert d_logits[0, expert].item() == pytest.approx(
            case.slope(objective, case.logits, expert), abs=1e-7, rel=1e-6
        )
        for o in range(len(outputs)):
            slope = case.slope(objective, outputs, o)
            assert d_outputs[0, expert, o].item() == pytest.approx(slope, abs=1e-7, rel=1e-6)


PRINTED = {
    "cooperative": lambda case, i, o: -2 * case.gates()[i] * (case.target[o] - case.mean()[o]),
    "competitive": lambda case, i, o: -2 * case.gates()[i] * (case.target[o] - case.outputs[i][o]),
    "likelihood": lambda case, i, o: -case.posterior()[i] * (case.target[o] - case.outputs[i][o]),
}


@pytest.mark.parametrize("objective", PRINTED)
@given(case=cases())
@settings(max_examples=25)
def test_an_expert_is_told_what_the_paper_prints(objective, case):
    mixture, target = case.tensors()
    (d_outputs,) = torch.autograd.grad(OBJECTIVES[objective](mixture, target).sum(), mixture.outputs_TEO)
    for i, outputs in enumerate(case.outputs):
        for o in range(len(outputs)):
            assert d_outputs[0, i, o].item() == pytest.approx(PRINTED[objective](case, i, o), abs=1e-12, rel=1e-9)


@given(case=cases())
@settings(max_examples=25)
def test_the_gate_follows_the_posterior(case):
    mixture, target = case.tensors()
    h_TE = posterior(mixture, target)
    assert h_TE[0].tolist() == pytest.approx(case.posterior(), rel=1e-9)
    (d_logits,) = torch.autograd.grad(OBJECTIVES["likelihood"](mixture, target).sum(), mixture.logits_TE)
    expected = [p - h for p, h in zip(case.gates(), case.posterior(), strict=True)]
    assert d_logits[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_the_likelihood_of_far_targets_is_finite():
    outputs = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64, requires_grad=True)
    mixture = Mixture(outputs, torch.zeros(1, 2, dtype=torch.float64))
    (error,) = OBJECTIVES["likelihood"](mixture, torch.tensor([[1000.0]], dtype=torch.float64))
    assert error.item() == pytest.approx(0.5 * 999**2 + math.log(2), rel=1e-12)  # the nearer expert gave it
    error.backward()
    assert outputs.grad is not None and outputs.grad.flatten().tolist() == pytest.approx([0.0, -999.0])


def test_gate_entropy_is_0_for_one_expert_alone_and_log_e_for_all_alike():
    entropy = gate_entropy(torch.tensor([[0.0, 0.0, 0.0], [1000.0, 0.0, -1000.0]], dtype=torch.float64))
    assert entropy.tolist() == pytest.approx([math.log(3), 0.0], abs=1e-12)


def piecewise():
    """|x|: two straight lines, each right on one side."""
    x = torch.linspace(-1, 1, 64, dtype=torch.float64)[:, None]
    return x, 4 * x.abs() - 2


def trained(objective, seed, steps=100):
    torch.manual_seed(seed)
    model = AdaptiveMixture([nn.Linear(1, 1) for _ in range(4)], nn.Linear(1, 4), objective).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    x, y = piecewise()
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(x, y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("seed", range(3))
def test_likelihood_gives_regions_to_experts_where_cooperation_shares_them(seed):
    x, _ = piecewise()
    entropy = {name: gate_entropy(trained(name, seed).gate(x)).mean().item() for name in ("likelihood", "cooperative")}
    assert entropy["likelihood"] < 0.8 * entropy["cooperative"]


def test_a_trained_expert_is_good_in_its_region_only_and_the_mixture_everywhere():
    x, y = piecewise()
    model = trained("likelihood", 0, steps=200)
    mixture = model.mixture(x)
    squared_TE = (mixture.outputs_TEO - y[:, None]).square().squeeze(-1)
    own_T = mixture.logits_TE.argmax(1)
    owned = [expert for expert in range(4) if (own_T == expert).sum() > 5]
    assert len(owned) >= 2
    for expert in owned:
        assert squared_TE[own_T == expert, expert].mean() < 0.1 * squared_TE[own_T != expert, expert].mean()
    assert (model(x) - y).square().mean() < 0.1 * squared_TE.mean(0).min()


def test_experts_may_be_any_modules():
    experts = [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))]
    model = AdaptiveMixture(experts, nn.Linear(3, 2))
    assert model(torch.randn(7, 3)).shape == (7, 2)
    model.loss(torch.randn(7, 3), torch.randn(7, 2)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_one_expert_is_a_plain_network():
    net = nn.Linear(3, 2)
    model = AdaptiveMixture([net], nn.Linear(3, 1), "cooperative")
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    assert torch.equal(model(x), net(x))
    assert model.loss(x, y).item() == pytest.approx((net(x) - y).square().sum(1).mean().item())


def test_impossible_mixtures_are_refused():
    with pytest.raises(ConfigError, match="a mixture of 0 experts; give at least 1"):
        AdaptiveMixture([], nn.Linear(3, 1))
    with pytest.raises(ConfigError, match="unknown objective 'likelyhood'; did you mean 'likelihood'"):
        AdaptiveMixture([nn.Linear(3, 1)], nn.Linear(3, 1), "likelyhood")
    with pytest.raises(ConfigError, match=r"gate logits of shape \(5, 3\) for 1 experts; the gate must give \(5, 1\)"):
        AdaptiveMixture([nn.Linear(3, 1)], nn.Linear(3, 3))(torch.zeros(5, 3))


@pytest.mark.parametrize("shape", [(5,), (5, 1), (1, 2), (4, 2)])
def test_targets_of_another_shape_are_refused(shape):
    model = AdaptiveMixture([nn.Linear(3, 2)], nn.Linear(3, 1))
    with pytest.raises(ConfigError, match=r"targets of shape .* must be \(5, 2\)"):
        model.loss(torch.zeros(5, 3), torch.zeros(shape))
    with pytest.raises(ConfigError, match=r"targets of shape .* must be \(5, 2\)"):
        posterior(model.mixture(torch.zeros(5, 3)), torch.zeros(shape))
