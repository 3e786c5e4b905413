import numpy as np
import pytest

from moesaic.telemetry.likeness import co_activation, duplicates, output_similarity

GENERATOR = np.random.default_rng(0)
OUTPUTS = GENERATOR.standard_normal((5, 40, 12))


def test_a_copy_is_found_and_its_size_matters():
    twins = OUTPUTS.copy()
    twins[3] = 0.9 * OUTPUTS[1] + 0.01 * OUTPUTS[2]
    (found,) = duplicates(twins)
    assert (found.first, found.second) == (1, 3) and found.similarity > 0.99 and abs(found.usual) < 0.1
    twins[3] = 0.5 * OUTPUTS[1]  # says the same, half as loudly
    assert duplicates(twins) == () == duplicates(OUTPUTS)
    twins[3] = -OUTPUTS[1]
    assert duplicates(twins) == ()


def test_a_layer_of_copies_and_dead_experts_are_no_duplicates():
    assert duplicates(np.repeat(OUTPUTS[:1], 5, axis=0)) == ()  # upcycled
    silent = OUTPUTS.copy()
    silent[:2] = 0
    assert duplicates(silent) == ()
    assert output_similarity(silent)[0].tolist() == [0] * 5


def test_routers_that_cannot_tell_them_apart_are_named():
    twins, router = OUTPUTS.copy(), GENERATOR.standard_normal((5, 7))
    twins[4] = twins[0]
    assert not duplicates(twins, router)[0].has_same_router
    router[4] = 2 * router[0]
    assert duplicates(twins, router)[0].has_same_router


def test_co_activation_counts_by_hand():
    choices = [[0, 1], [0, 1], [0, 2], [2, 3], [-1, -1], [3, -1]]
    found = co_activation(choices, 4)
    expected = [[1, 2 / 3, 1 / 3, 0], [1, 1, 0, 0], [1 / 2, 0, 1, 1 / 2], [0, 0, 1 / 2, 1]]
    assert found.share_EE == pytest.approx(np.array(expected))
    assert found.chance == pytest.approx((9 / 5 - 1) / 3)


def test_pairs_beyond_chance_and_no_others():
    """Even choices of 2 in 8 show no pair; experts 2 and 5 always together do."""
    even = np.array([GENERATOR.permutation(8)[:2] for _ in range(4000)])
    found = co_activation(even, 8)
    assert found.pairs == () and found.share_EE[0, 1] == pytest.approx(1 / 7, abs=0.04)
    even[:400] = (2, 5)
    (pair,) = co_activation(even, 8).pairs
    assert (pair.first, pair.second) == (2, 5) and pair.lift > 2 and pair.together >= 400


def test_a_layer_grown_from_copies_has_no_duplicates():
    """Three of five: they are not one mistake but how the layer was made."""
    grown = OUTPUTS.copy()
    grown[1:3] = grown[0]
    assert duplicates(grown) == ()


def test_copies_that_the_router_cannot_tell_apart_are_told_however_many_there_are():
    """Every expert doubled, its router row with it: a pair is always chosen together, and never parts."""
    rows = np.random.default_rng(1).standard_normal((len(OUTPUTS), 16))
    outputs, router = np.repeat(OUTPUTS, 2, axis=0), np.repeat(rows, 2, axis=0)
    pairs = [(pair.first, pair.second) for pair in duplicates(outputs, router)]
    assert sorted(pairs) == [(first, first + 1) for first in range(0, len(outputs), 2)]
    router[1::2] = np.random.default_rng(2).standard_normal(rows.shape)  # as upcycling makes them
    assert duplicates(outputs, router) == ()
