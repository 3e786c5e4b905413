"""Drawing a token: what sorting everything gives, and the distribution that the rules define."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moesaic.engine.sampling import Sampling
from moesaic.serve.drawing import draw, draw_by_sorting, random_number

NUMBERS = st.floats(0, 1, exclude_max=True)
TEMPERATURES = st.sampled_from([1e-320, 1e-30, 0.01, 0.7, 1.0, 2.0, 100.0])
SAMPLINGS = st.builds(
    Sampling,
    temperature=TEMPERATURES,
    top_k=st.none() | st.integers(1, 300),
    top_p=st.none() | st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999999, math.nextafter(1, 0), 1.0]),
    min_p=st.none() | st.sampled_from([0.0, 1e-9, 0.05, 0.5, 1.0]),
)
FEW = st.lists(st.sampled_from([-math.inf, -80.0, -1.0, 0.0, 0.5, 3.0]), min_size=1, max_size=200)
FLOATS = st.lists(st.floats(-50, 50, width=32) | st.just(-math.inf), min_size=1, max_size=200)


@given(FEW | FLOATS, SAMPLINGS, NUMBERS)
@settings(max_examples=250, deadline=None)
def test_draws_what_sorting_gives(values: list[float], sampling: Sampling, number: float) -> None:
    logits = np.array([*values, 0.0], np.float32)[: len(values)]
    if not np.isfinite(logits).any():
        logits[-1] = 1.0
    found, wanted = draw(logits, sampling, number), draw_by_sorting(logits, sampling, number)
    assert found == wanted or _at_a_border(logits, sampling, number, found, wanted)


def _at_a_border(logits: np.ndarray, sampling: Sampling, number: float, *tokens: int) -> bool:
    """Whether two tokens meet where the number points, so that the order of summing decides."""
    near = [min(max(number + step, 0.0), math.nextafter(1, 0)) for step in (-1e-12, 1e-12)]
    return {draw_by_sorting(logits, sampling, each) for each in near} == set(tokens)


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 1000, 50_257])
@pytest.mark.parametrize(
    "rules",
    [{}, {"top_k": 1}, {"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.95, "top_k": 20, "min_p": 0.02}, {"min_p": 0.1}],
    ids=str,
)
def test_large_rows(vocab: int, rules: dict[str, float]) -> None:
    generator = np.random.default_rng(vocab)
    for spread in (0.01, 2.0, 10.0):
        logits = (generator.standard_normal(vocab) * spread).astype(np.float32)
        sampling = Sampling(temperature=0.8, **rules)  # type: ignore[arg-type]
        for number in (0.0, *generator.random(20), math.nextafter(1, 0)):
            assert draw(logits, sampling, number) == draw_by_sorting(logits, sampling, number)


def test_only_what_is_possible_is_drawn() -> None:
    logits = np.full(77, -np.inf, np.float32)
    logits[40] = -3.0
    for number in (0.0, 0.5, math.nextafter(1, 0)):
        for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5, top_k=3)):
            assert draw(logits, sampling, number) == 40


def test_the_same_row_elsewhere_in_memory() -> None:
    whole = np.random.default_rng(0).standard_normal(5 * 1003 + 16).astype(np.float32)
    for start in range(16):
        row, copied = whole[start : start + 1003], whole[start : start + 1003].copy()
        for number in (0.1, 0.77):
            for sampling in (Sampling(temperature=1.3), Sampling(temperature=1.3, top_p=0.8)):
                assert draw(row, sampling, number) == draw(copied, sampling, number)


def test_random_numbers_stay_as_they_are() -> None:
    """Texts written with a seed must not change from one release to the next."""
    assert random_number(0, 0) == np.random.Generator(np.random.Philox(key=0)).random()
    found = [random_number(7, 5), random_number(-1, 2**40)]
    assert found == [0.4543056052750971, 0.20353554039193045]


@pytest.mark.parametrize("rules", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_the_distribution(rules: dict[str, float]) -> None:
    """Chi-square over the tokens that the rules leave; seeds are fixed, so it cannot fail by chance."""
    logits = (np.random.default_rng(3).standard_normal(40)).astype(np.float32)
    sampling = Sampling(temperature=0.9, **rules)  # type: ignore[arg-type]
    drawn = [draw(logits, sampling, random_number(11, position)) for position in range(5_000)]
    counts = np.bincount(drawn, minlength=40)
    share = _shares(logits / 0.9, rules)
    assert (counts[share == 0] == 0).all()
    likely = share * len(drawn) >= 5
    assert stats.chisquare(counts[likely], share[likely] / share[likely].sum() * counts[likely].sum()).pvalue > 0.01


def _shares(logits: np.ndarray, rules: dict[str, float]) -> np.ndarray:
    share = np.exp(logits.astype(np.float64))
    share /= share.sum()
    order = np.argsort(-share)
    ends = np.cumsum(share[order])
    keep = np.full(len(share), True)
    if "top_k" in rules:
        keep[order[int(rules["top_k"]) :]] = False
    if "top_p" in rules:
        keep[order[1:][ends[:-1] >= rules["top_p"]]] = False
    if "min_p" in rules:
        keep &= share >= rules["min_p"] * share.max()
    return np.where(keep, share, 0) / share[keep].sum()


def test_neighbouring_seeds_and_places_have_nothing_in_common() -> None:
    numbers = np.array([[random_number(seed, place) for place in range(60)] for seed in range(60)])
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 0.01
    across = np.corrcoef(numbers)[np.triu_indices(60, 1)]
    assert abs(across).max() < 0.55
