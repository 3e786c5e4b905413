"""The 1994 hierarchy against the paper's equations in plain Python, and EM's promise as a property."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.layers.hierarchical_mixture import HierarchicalMixture, fit_gates


def drawn_data(num_cases, input_size, output_size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_cases, input_size, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_cases, output_size, generator=generator, dtype=torch.float64)
    bend = torch.where(x[:, :1] > 0, 2 * x[:, :1], -x[:, :1])
    return x, bend + 0.3 * noise


class ByHand:
    """Two levels, one case at a time, as printed."""

    def __init__(self, model):
        self.top = model.gates[0].tolist()[0]
        self.lower = model.gates[1].tolist()
        self.leaf = model.leaf_MOF.tolist()
        self.variance = model.log_variance_MO.exp().tolist()

    @staticmethod
    def softmax(rows, features):
        logits = [sum(v * f for v, f in zip(row, features, strict=True)) for row in rows]
        total = sum(math.exp(z) for z in logits)
        return [math.exp(z) / total for z in logits]

    def paths(self, x):
        """(i, j, g_i, g_{j|i}, leaf number) of every leaf."""
        features = [*x, 1.0]
        leaf = 0
        for i, g_i in enumerate(self.softmax(self.top, features)):
            for j, g_ji in enumerate(self.softmax(self.lower[i], features)):
                yield i, j, g_i, g_ji, leaf
                leaf += 1

    def means(self, leaf, x):
        return [sum(w * f for w, f in zip(row, [*x, 1.0], strict=True)) for row in self.leaf[leaf]]

    def density(self, leaf, x, y):
        value = 1.0
        for target, mean, variance in zip(y, self.means(leaf, x), self.variance[leaf], strict=True):
            value *= math.exp(-0.5 * (target - mean) ** 2 / variance) / math.sqrt(2 * math.pi * variance)
        return value

    def likelihood(self, x, y):
        return sum(g_i * g_ji * self.density(leaf, x, y) for _, _, g_i, g_ji, leaf in self.paths(x))

    def posteriors(self, x, y):
        """h_i h_{j|i}, each from its own formula."""
        inner = [g_ji * self.density(leaf, x, y) for _, _, _, g_ji, leaf in self.paths(x)]
        branches, children = len(self.top), len(self.lower[0])
        sums = [sum(inner[i * children : (i + 1) * children]) for i in range(branches)]
        outer = [g * s for g, s in zip(self.softmax(self.top, [*x, 1.0]), sums, strict=True)]
        h_i = [value / sum(outer) for value in outer]
        return [h_i[i] * inner[i * children + j] / sums[i] for i in range(branches) for j in range(children)]

    def mean(self, x):
        means = [[g_i * g_ji * m for m in self.means(leaf, x)] for _, _, g_i, g_ji, leaf in self.paths(x)]
        return [sum(column) for column in zip(*means, strict=True)]


@pytest.fixture
def tree():
    model = HierarchicalMixture(2, 2, (3, 2), seed=4)
    with torch.no_grad():
        model.log_variance_MO.copy_(torch.linspace(-1, 0.5, 12, dtype=torch.float64).view(6, 2))
    return model


def test_two_levels_are_what_the_paper_prints(tree):
    x, y = drawn_data(9, 2, 2, seed=1)
    hand = ByHand(tree)
    expected = sum(math.log(hand.likelihood(a, b)) for a, b in zip(x.tolist(), y.tolist(), strict=True))
    assert tree.log_likelihood(x, y).item() == pytest.approx(expected, rel=1e-12)
    posterior_TM = tree.posteriors(x, y)
    for case, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        assert posterior_TM[case].tolist() == pytest.approx(hand.posteriors(a, b), rel=1e-10)
        assert tree(x)[case].tolist() == pytest.approx(hand.mean(a), rel=1e-10)


def test_the_gradient_of_the_log_likelihood(tree):
    x, y = drawn_data(5, 2, 2, seed=2)
    names, parameters = zip(*tree.named_parameters(), strict=True)

    class Value(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tree = tree

        def forward(self):
            return tree.log_likelihood(x, y)

    def value(*changed):
        swapped = {f"tree.{name}": tensor for name, tensor in zip(names, changed, strict=True)}
        return torch.func.functional_call(Value(), swapped, ())

    assert torch.autograd.gradcheck(value, parameters)


BRANCHINGS = [(1,), (3,), (2, 2), (1, 3), (2, 3), (2, 1, 2), (2, 2, 2)]


@given(
    branching=st.sampled_from(BRANCHINGS),
    num_cases=st.integers(1, 30),
    input_size=st.integers(1, 3),
    output_size=st.integers(1, 2),
    seed=st.integers(0, 10_000),
    gate_steps=st.integers(1, 5),
)
@settings(max_examples=40)
def test_no_step_of_em_lowers_the_log_likelihood(branching, num_cases, input_size, output_size, seed, gate_steps):
    x, y = drawn_data(num_cases, input_size, output_size, seed)
    model = HierarchicalMixture(input_size, output_size, branching, seed=seed)
    before = model.log_likelihood(x, y).item()
    for _ in range(5):
        assert model.em_step(x, y, gate_steps=gate_steps).log_likelihood == pytest.approx(before, rel=1e-12)
        after = model.log_likelihood(x, y).item()
        assert after >= before - 1e-9 * (1 + abs(before))
        before = after


@pytest.mark.parametrize("data", ["constant", "repeated", "separable", "huge"])
def test_em_stays_finite_and_rising_where_fits_are_degenerate(data):
    x, y = drawn_data(24, 2, 1, seed=3)
    if data == "constant":
        x, y = torch.ones_like(x), torch.ones_like(y)
    elif data == "repeated":
        x = x[:1].repeat(24, 1)
    elif data == "separable":
        y = torch.where(x[:, :1] > 0, 5.0, -5.0).double()  # the gate's weights want to be infinite
    else:
        x, y = 1e6 * x, 1e6 * y
    model = HierarchicalMixture(2, 1, (2, 2), seed=0)
    values = [model.em_step(x, y).log_likelihood for _ in range(25)]
    assert all(math.isfinite(value) for value in values)
    assert all(b >= a - 1e-9 * (1 + abs(a)) for a, b in itertools.pairwise(values))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_one_leaf_is_least_squares_after_one_step():
    x, y = drawn_data(20, 3, 2, seed=5)
    model = HierarchicalMixture(3, 2, (1,), seed=0)
    model.em_step(x, y)
    design = torch.cat([x, torch.ones(20, 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.inv(design.T @ design) @ design.T @ y
    torch.testing.assert_close(model.leaf_MOF[0].T.detach(), expected, rtol=1e-9, atol=1e-9)
    variance = (y - design @ expected).square().mean(0)
    torch.testing.assert_close(model.log_variance_MO[0].exp().detach(), variance, rtol=1e-9, atol=1e-12)


def test_a_leaf_is_fit_by_weighted_least_squares():
    x, y = drawn_data(15, 1, 1, seed=6)
    model = HierarchicalMixture(1, 1, (2,), seed=1)
    weights = model.posteriors(x, y)[:, 0].tolist()
    model.em_step(x, y)
    xs, ys = x[:, 0].tolist(), y[:, 0].tolist()
    total = sum(weights)
    mean_x = sum(w * a for w, a in zip(weights, xs, strict=True)) / total
    mean_y = sum(w * b for w, b in zip(weights, ys, strict=True)) / total
    covariance = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in zip(weights, xs, ys, strict=True))
    slope = covariance / sum(w * (a - mean_x) ** 2 for w, a in zip(weights, xs, strict=True))
    intercept = mean_y - slope * mean_x
    assert model.leaf_MOF[0, 0].tolist() == pytest.approx([slope, intercept], rel=1e-9)
    residual = sum(w * (b - slope * a - intercept) ** 2 for w, a, b in zip(weights, xs, ys, strict=True)) / total
    assert model.log_variance_MO[0, 0].exp().item() == pytest.approx(residual, rel=1e-9)


def test_gates_reach_the_point_where_their_slope_is_0():
    x, _ = drawn_data(40, 2, 1, seed=7)
    features = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], dim=1)
    generator = torch.Generator().manual_seed(8)
    targets = torch.rand(40, 2, 3, generator=generator, dtype=torch.float64)
    start = torch.zeros(2, 3, 3, dtype=torch.float64)
    weight = fit_gates(start, targets, features, steps=30).weight_NJF.requires_grad_()
    logits = torch.einsum("tf,njf->tnj", features, weight)
    (targets * logits.log_softmax(-1)).sum().backward()
    assert weight.grad is not None and weight.grad.abs().max() < 1e-5
    one_step = fit_gates(start, targets, features, steps=1)
    assert one_step.sweeps == 1 and not torch.equal(one_step.weight_NJF, weight)


def test_a_bend_is_found_by_two_leaves_and_not_by_one():
    x, y = drawn_data(200, 1, 1, seed=9)
    values = {}
    for branching in ((1,), (2,)):
        model = HierarchicalMixture(1, 1, branching, seed=0)
        for _ in range(40):
            model.em_step(x, y)
        values[branching] = model.log_likelihood(x, y).item() / 200
    assert values[(2,)] > values[(1,)] + 0.5
    assert values[(2,)] > -math.log(0.3 * math.sqrt(2 * math.pi * math.e)) - 0.15  # the noise's own entropy


def test_a_seed_is_a_start_and_fp32_works():
    x, y = drawn_data(30, 2, 1, seed=10)
    runs = []
    for seed, dtype in ((0, torch.float64), (0, torch.float64), (1, torch.float64), (0, torch.float32)):
        model = HierarchicalMixture(2, 1, (2, 2), seed=seed, dtype=dtype)
        runs.append([model.em_step(x, y).log_likelihood for _ in range(5)])
        assert model.leaf_MOF.dtype == dtype
    assert runs[0] == runs[1] != runs[2]
    assert runs[3] == pytest.approx(runs[0], rel=1e-2)


def test_a_leafs_variance_stays_above_its_bound():
    x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    model = HierarchicalMixture(1, 1, (2,), min_variance=1e-4, seed=0)
    for _ in range(20):
        model.em_step(x, 3 * x)
    assert model.log_variance_MO.exp().min().item() == pytest.approx(1e-4, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 0}, "input_size=0; it must be a whole number above 0"),
        ({"output_size": 0}, "output_size=0; it must be a whole number above 0"),
        ({"branching": ()}, r"branching=\(\); give the children of a node at each level"),
        ({"branching": (2, 0)}, r"branching=\(2, 0\); give the children"),
        ({"min_variance": 0.0}, "min_variance=0.0; it must be above 0"),
    ],
)
def test_impossible_trees_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        HierarchicalMixture(**{"input_size": 2, "output_size": 1, **arguments})


def test_wrong_shapes_and_steps_are_refused():
    model = HierarchicalMixture(2, 1)
    x, y = torch.zeros(5, 2), torch.zeros(5, 1)
    for wrong in (torch.zeros(5, 3), torch.zeros(2)):
        with pytest.raises(ConfigError, match=r"inputs of shape .* must be \[cases, 2\]"):
            model(wrong)
    for wrong in (torch.zeros(5), torch.zeros(5, 2), torch.zeros(1, 1)):
        with pytest.raises(ConfigError, match=r"targets of shape .* must be \(5, 1\)"):
            model.em_step(x, wrong)
    with pytest.raises(ConfigError, match="gate_steps=0; it must be a whole number above 0"):
        model.em_step(x, y, gate_steps=0)
