import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize

from moesaic.routing.assignment import balanced_assignment


def summed(values_TE, expert_ids_T):
    return values_TE[np.arange(len(values_TE)), expert_ids_T].sum()


def assert_even(expert_ids_T, num_experts):
    counts = np.bincount(expert_ids_T, minlength=num_experts)
    assert len(counts) == num_experts and counts.max() - counts.min() <= 1


@settings(max_examples=60)
@given(st.data())
def test_no_even_assignment_is_better(data):
    """All of them, tried one by one; whole numbers make many that are equally good."""
    num_tokens, num_experts = data.draw(st.sampled_from([(0, 3), (1, 3), (4, 1), (5, 2), (6, 3), (7, 2), (4, 4)]))
    number = data.draw(st.sampled_from([st.floats(-3, 3), st.integers(-2, 2).map(float), st.floats(-1e6, 1e6)]))
    values_TE = data.draw(arrays(np.float64, (num_tokens, num_experts), elements=number))
    expert_ids_T = balanced_assignment(values_TE)
    assert_even(expert_ids_T, num_experts)
    low, high = num_tokens // num_experts, -(-num_tokens // num_experts)
    ways = itertools.product(range(num_experts), repeat=num_tokens)
    even = [list(way) for way in ways if all(low <= way.count(e) <= high for e in range(num_experts))]
    best = max(summed(values_TE, np.array(way, dtype=np.int64)) for way in even)
    size = np.abs(values_TE).max(initial=1.0)
    assert summed(values_TE, expert_ids_T) == pytest.approx(best, abs=1e-11 * size)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(96, 8), (300, 12), (60, 60), (40, 64)])
def test_larger_ones_are_as_good_as_scipys(num_tokens, num_experts):
    """Where experts get equally many, a place for each token is scipy's problem; else some places stay empty."""
    values_TE = np.random.default_rng(num_tokens).normal(size=(num_tokens, num_experts))
    values_TE[:, 0] += 2
    expert_ids_T = balanced_assignment(values_TE)
    assert_even(expert_ids_T, num_experts)
    places = -(-num_tokens // num_experts)
    _, columns = optimize.linear_sum_assignment(np.repeat(values_TE, places, axis=1), maximize=True)
    assert summed(values_TE, expert_ids_T) == pytest.approx(summed(values_TE, columns // places), rel=1e-12)
