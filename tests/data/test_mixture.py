import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.mixture import DECK_SIZE, Mixture, weights_of, weights_of_epochs
from moesaic.errors import DataError

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=20).filter(any)


@given(weights=WEIGHTS, seed=st.integers(0, 2**32), pieces=st.lists(st.integers(1, 900), min_size=1, max_size=6))
def test_samples_are_the_same_however_they_are_asked_for(weights: list[float], seed: int, pieces: list[int]) -> None:
    total = sum(pieces)
    whole = Mixture(weights, seed).samples(0, total)
    mixture, first = Mixture(weights, seed), 0
    for count in pieces:
        part = mixture.samples(first, count)
        assert np.array_equal(part.domains, whole.domains[first : first + count])
        assert np.array_equal(part.dealt_before, whole.dealt_before[first : first + count])
        first += count
    assert whole.domains.dtype == whole.dealt_before.dtype == np.int64
    for domain in range(len(weights)):
        dealt = whole.dealt_before[whole.domains == domain]
        assert dealt.tolist() == list(range(len(dealt)))  # none twice, none skipped, in order
        assert len(dealt) == 0 or weights[domain] > 0


@given(weights=WEIGHTS, decks=st.integers(1, 10**9))
def test_after_every_deck_each_domain_has_had_its_share(weights: list[float], decks: int) -> None:
    mixture = Mixture(weights, 0)
    dealt = mixture._dealt(decks)
    assert (np.abs(dealt - mixture.shares_D * decks * DECK_SIZE) <= 0.5 + 1e-3).all()
    assert (mixture._dealt(decks + 1) >= dealt).all()


def test_rare_domains_come_rarely() -> None:
    counts = Counter(Mixture([1.0, 1e-4], 0).samples(0, 100_000).domains.tolist())
    assert counts[1] == 10


def test_the_order_within_a_deck_is_shuffled_and_follows_the_seed() -> None:
    one, other, again = (Mixture([1, 1], seed).samples(0, 500).domains for seed in (0, 1, 0))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert 200 < np.count_nonzero(np.diff(one)) < 400  # neither in blocks nor in turn


@settings(max_examples=30)
@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=6), first=st.integers(0, 10_000))
def test_no_domain_is_ever_far_from_its_share(weights: list[float], first: int) -> None:
    mixture = Mixture(weights, 0)
    dealt = (mixture.samples(0, first + 50).domains[:, None] == np.arange(len(weights))).cumsum(axis=0)
    wanted = np.arange(1, first + 51)[:, None] * mixture.shares_D
    assert np.abs(dealt - wanted).max() < 1.5 + len(weights) / 2


@given(
    windows=st.lists(st.integers(1, 5000), min_size=1, max_size=8),
    passes=st.lists(st.floats(0.5, 20), min_size=8, max_size=8),
)
def test_a_run_goes_through_each_domain_as_often_as_asked(windows: list[int], passes: list[float]) -> None:
    names = [f"d{i}" for i in range(len(windows))]
    epochs = dict(zip(names, passes, strict=False))
    run = math.ceil(math.fsum(count * times for count, times in zip(windows, passes, strict=False)))
    mixture = Mixture(weights_of_epochs(names, windows, epochs, run, 8), 0)
    samples = mixture.samples(0, run)
    for domain, (count, times) in enumerate(zip(windows, passes, strict=False)):
        assert abs((samples.domains == domain).sum() - count * times) <= 2 + len(windows)


def test_epochs_that_do_not_fit_the_run_say_what_would() -> None:
    message = r"add up to 24,000 tokens, but the run trains on 12,000; make it 2 times as long, or .* epochs by 0\.5"
    with pytest.raises(DataError, match=message):
        weights_of_epochs(["a", "b"], [1000, 100], {"a": 2, "b": 4}, 1200, 10)
    assert weights_of_epochs(["a", "b"], [1000, 100], {"a": 2, "b": 4}, 2395, 10) == [2000, 400]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"c": 1.0}, r"weights for unknown domain 'c'; known: a, b"),
        ({"a": -1.0}, r"must be numbers of 0 or more"),
        ({"a": 0.0}, r"must be numbers of 0 or more, and one above 0"),
        ({"a": 1e308, "b": 1e308}, r"add up to inf; use at most 1e\+100"),
        ({"a": math.nan}, r"must be numbers of 0 or more"),
        ("equal", r"weights='equal'; use 'proportional', 'uniform'"),
    ],
)
def test_bad_weights(weights, message: str) -> None:
    with pytest.raises(DataError, match=message):
        weights_of(["a", "b"], [1, 2], weights)
