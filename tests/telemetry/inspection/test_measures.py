import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.telemetry.inspection.measures import (
    divergence_from_average,
    information,
    specialisation,
)

ROUTING = Path(__file__).parents[4] / "shared" / "data" / "routing"
tables = st.integers(2, 6).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 90), min_size=width, max_size=width), min_size=2, max_size=5)
)


@pytest.mark.parametrize(
    ("name", "digits", "printed"),
    [("olmoe", 3, [0.041, 0.104, 0.133]), ("mixtral-8x7b", 4, [0.0008, 0.0009, 0.0022])],
)
def test_the_divergences_of_olmoe_and_mixtral_at_layers_0_7_15(name, digits, printed):
    """Counts of github.com/allenai/OLMoE, scripts/routing_output, over the five domains that both models read."""
    path = ROUTING / f"olmoe_routing_{name}.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    tree = json.loads(path.read_text())
    by_domain = [counts for domain, counts in tree["expert_counts"].items() if domain != "tulu"]
    assert (tree["layers"], len(by_domain)) == ([0, 7, 15], 5)
    found = [divergence_from_average([counts[layer] for counts in by_domain]) for layer in range(3)]
    assert [round(value, digits) for value in found] == printed


@given(tables)
def test_divergence_is_the_mean_of_two_sided_divergences(table):
    counts = np.array([row for row in table if any(row)], float)
    found = divergence_from_average(table)
    if len(counts) < 2:
        assert math.isnan(found)
        return
    shares = counts / counts.sum(1, keepdims=True)
    mean = shares.mean(0)

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        return sum(a * math.log2(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    slow = [(kl(p, (p + mean) / 2) + kl(mean, (p + mean) / 2)) / 2 for p in shares]
    assert found == pytest.approx(np.mean(slow), abs=1e-9)
    assert 0 <= found <= 1


@given(tables)
def test_information_is_symmetric_and_nothing_when_independent(table):
    if not np.any(table):
        assert math.isnan(information(table))
        return
    assert information(table) == pytest.approx(information(np.transpose(table)), abs=1e-9)
    assert information(np.outer(np.sum(table, 1), np.sum(table, 0))) == pytest.approx(0, abs=1e-9)
    assert information(table) <= math.log2(min(np.shape(table))) + 1e-9


def test_information_and_specialisation_by_hand():
    assert information([[4, 0], [0, 4]]) == pytest.approx(1)
    # Token 0 goes to expert 0 in 3 of 4 places, token 1 to expert 1 in 8 of 10, expert 2 has 2 of 10 and 1 of 4.
    assert specialisation([[3, 0, 1], [0, 8, 2]], [4, 10]) == pytest.approx((0.75 + 0.8 + 0.25) / 3)
    assert math.isnan(specialisation(np.zeros((0, 3)), []))
