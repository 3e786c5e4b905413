import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import DataError
from moesaic.telemetry.health import (
    RouterHealth,
    coefficient_of_variation,
    dead_experts,
    domain_divergence,
    domain_shares,
    enough_to_tell,
    load_entropy,
    load_shares,
    max_violation,
)
from moesaic.telemetry.load import LayerLoad, StepLoad, sum_loads

counts_lists = st.lists(st.integers(0, 10_000), min_size=2, max_size=40).filter(any)
domain_tables = st.integers(2, 8).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 500), min_size=width, max_size=width), min_size=2, max_size=5)
)


def layer_load(counts: list[int], *, layer: int = 0, top_k: int = 1, num_tokens: int | None = None) -> LayerLoad:
    return LayerLoad(
        layer=layer,
        top_k=top_k,
        counts_E=np.array(counts, dtype=np.int64),
        num_tokens=sum(counts) // top_k if num_tokens is None else num_tokens,
        router_entropy=0.5 * math.log(len(counts)),
    )


def health_of(*loads: LayerLoad) -> RouterHealth:
    return RouterHealth.of(StepLoad(step=1, layers=loads))


@given(counts_lists, st.integers(2, 9), st.randoms(use_true_random=False))
def test_measures_stay_in_range_and_ignore_order_and_scale(counts, factor, random):
    shuffled = [factor * count for count in counts]
    random.shuffle(shuffled)
    assert load_shares(counts).sum() == pytest.approx(1)
    assert -1e-12 <= load_entropy(counts) <= 1 + 1e-12
    assert -1e-12 <= max_violation(counts) <= len(counts) - 1 + 1e-9
    assert 0 <= coefficient_of_variation(counts) <= math.sqrt(len(counts) - 1) + 1e-9
    for measure in (load_entropy, max_violation, coefficient_of_variation):
        assert measure(shuffled) == pytest.approx(measure(counts), abs=1e-9)


def test_even_and_collapsed_loads():
    assert load_entropy([7, 7, 7]) == pytest.approx(1)
    assert (max_violation([7, 7, 7]), coefficient_of_variation([7, 7, 7])) == (0, 0)
    assert (load_entropy([0, 21, 0]), max_violation([0, 21, 0])) == (0, pytest.approx(2))
    assert max_violation([1, 2, 3, 6]) == pytest.approx(1)
    assert load_entropy([5]) == 1


def test_no_rows_is_not_a_number():
    for measure in (load_entropy, max_violation, coefficient_of_variation):
        assert math.isnan(measure([0, 0, 0]))
    assert load_shares([0, 0]).tolist() == [0, 0]


@given(domain_tables, st.integers(2, 5))
def test_divergence_is_a_share_and_ignores_the_size_of_domains(table, factor):
    divergence = domain_divergence(table)
    if sum(map(any, table)) < 2:
        assert math.isnan(divergence)
        return
    assert 0 <= divergence <= 1
    rescaled = [[factor * count for count in table[0]], *table[1:]]
    assert domain_divergence(rescaled) == pytest.approx(divergence, abs=1e-9)
    assert domain_divergence(table[::-1]) == pytest.approx(divergence, abs=1e-9)
    shares = domain_shares(table)
    assert all(row.sum() == pytest.approx(1) for row in shares if row.any())


def test_divergence_at_its_ends_and_by_hand():
    assert domain_divergence([[3, 1], [6, 2], [9, 3]]) == pytest.approx(0, abs=1e-12)
    assert domain_divergence([[4, 0, 0], [0, 9, 0], [0, 0, 1]]) == pytest.approx(1)
    # H((3/4, 1/4)) - (0 + 1)/2 in bits
    assert domain_divergence([[2, 0], [1, 1]]) == pytest.approx(0.811278 - 0.5, abs=1e-6)


@given(st.integers(1, 8), st.integers(1, 64), st.integers(1, 3000))
def test_more_tokens_never_tell_less(top_k, spare, num_tokens):
    num_experts = top_k + spare
    if enough_to_tell(num_tokens, top_k, num_experts):
        assert enough_to_tell(num_tokens + 1, top_k, num_experts)
        assert num_experts * (1 - top_k / num_experts) ** num_tokens < 0.01


def test_the_dead_are_told_only_from_enough_rows():
    assert dead_experts([9, 0, 9, 10], num_tokens=14, top_k=2) == (1,)
    assert dead_experts([2, 0, 1, 1], num_tokens=2, top_k=2) is None
    assert dead_experts([1000, 24, 1000, 976], num_tokens=3000, top_k=1) == (1,)
    assert dead_experts([0, 0], num_tokens=0, top_k=2) is None


def test_verdicts():
    even = layer_load([100] * 8)
    assert health_of(even).verdict == "healthy"
    assert health_of(even).is_healthy
    dead = layer_load([100] * 7 + [0], layer=3)
    assert health_of(even, dead).verdict == "1 of 16 experts dead: layer 3 expert 7"
    heavy = layer_load([400, 80, 80, 80, 80, 80, 80, 80], layer=2)
    assert health_of(heavy).verdict == "uneven: layer 2 expert 0 has 3.3 times its fair share"
    assert health_of(layer_load([1, 0, 0, 1], layer=5)).verdict.endswith("too few rows to tell in layer 5")
    assert health_of().verdict == "no routed layers"
    many = layer_load([1000, *[0] * 9], layer=1)
    assert "and 3 more" in health_of(many).verdict


def test_overall_numbers_are_means_of_layers_and_never_pooled():
    left, right = layer_load([100, 0]), layer_load([0, 100], layer=1)
    assert health_of(left, right).max_violation == pytest.approx(1)
    assert health_of(left, right).load_entropy == 0
    assert health_of(left, right).router_entropy == pytest.approx(0.5)


def test_loads_add_up_and_survive_json():
    first = StepLoad(step=1, layers=(layer_load([1, 2, 3]),))
    second = StepLoad(step=2, layers=(layer_load([10, 0, 0]),))
    both = sum_loads([first, second])
    assert (both.step, both.layers[0].counts_E.tolist(), both.layers[0].num_tokens) == (2, [11, 2, 3], 16)
    assert both.layers[0].router_entropy == pytest.approx(0.5 * math.log(3))
    again = StepLoad.from_json(json.loads(json.dumps(both.to_json())))
    assert again.to_json() == both.to_json()
    with pytest.raises(DataError, match="no steps"):
        sum_loads([])
    with pytest.raises(DataError, match="not a recorded load"):
        StepLoad.from_json({"step": 1})
