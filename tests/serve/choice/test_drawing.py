"""Drawing a token: what sorting everything gives, and the distribution that the rules define."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moesaic.engine.sampling import Sampling
from moesaic.serve.choice.drawing import NOTHING, draw_by_sorting, draw_rows, random_number, score_rows
from tests.serve import tiny

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


def draw(logits: np.ndarray, sampling: Sampling, number: float) -> int:
    return draw_rows([logits], [sampling], [number])[0]


@given(FEW | FLOATS, SAMPLINGS, NUMBERS)
@settings(max_examples=250)
def test_draws_what_sorting_gives(values: list[float], sampling: Sampling, number: float) -> None:
    logits = np.array([*values, 0.0], np.float32)[: len(values)]
    if not np.isfinite(logits).any():
        logits[-1] = 1.0
    found, wanted = draw(logits, sampling, number), draw_by_sorting(logits, sampling, number)
    assert found == wanted or _at_a_border(logits, sampling, number, found, wanted)


def _at_a_border(logits: np.ndarray, sampling: Sampling, number: float, *tokens: int) -> bool:
    """Whether two tokens meet where the number points, so that the last bits of weights and sums decide."""
    near = [min(max(number + step, 0.0), math.nextafter(1, 0)) for step in (-3e-7, 3e-7)]
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


@given(st.integers(-(2**63), 2**70), st.integers(0, 2**40))
def test_random_numbers_are_those_of_numpy(seed: int, position: int) -> None:
    words = np.random.Philox(key=seed % 2**64, counter=position)
    assert random_number(seed, position) == np.random.Generator(words).random()


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


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 1000, 50_257])
def test_scores_are_those_of_log_softmax(vocab: int) -> None:
    logits = (np.random.default_rng(vocab).standard_normal((3, vocab)) * 4).astype(np.float32)
    token_ids = [0, vocab // 2, vocab - 1]
    wanted_NV = torch.from_numpy(logits).double().log_softmax(-1)
    top = wanted_NV.topk(min(5, vocab))
    for row, scores in enumerate(score_rows(list(logits), token_ids, [5, 5, 5])):
        assert scores.logprob == pytest.approx(wanted_NV[row, token_ids[row]].item(), abs=1e-6)
        assert scores.top_ids == top.indices[row].tolist()
        assert scores.top_logprobs == pytest.approx(top.values[row].tolist(), abs=1e-6)


def test_an_engines_threads_draw_the_same() -> None:
    program = tiny.engine(threads=2).program
    logits = np.random.default_rng(8).standard_normal((40, 20_000)).astype(np.float32) * 3
    rules = [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=1.2, top_p=0.9),
        Sampling(temperature=1, top_k=9),
    ]
    samplings, numbers = rules * 10, [random_number(1, place) for place in range(40)]
    alone = [draw(*each) for each in zip(logits, samplings, numbers, strict=True)]
    assert draw_rows(list(logits), samplings, numbers, program) == alone
    scores = score_rows(list(logits), alone, [3] * 40, program)
    assert scores == [score_rows([row], [token], [3])[0] for row, token in zip(logits, alone, strict=True)]


def test_what_cannot_be_drawn_from_is_refused() -> None:
    logits, sampling = np.zeros(5, np.float32), Sampling(temperature=1.0)
    with pytest.raises(ValueError, match=r"row has shape \[4\]|row must be float32 \[5\]"):
        draw_rows([logits, logits[:4]], [sampling] * 2, [0.1, 0.2])
    with pytest.raises(ValueError, match="rules are out of their ranges"):
        draw_rows([logits], [sampling], [1.0])
    with pytest.raises(ValueError, match="wanted are tokens or counts that there are not"):
        score_rows([logits], [5], [1])
    assert draw_rows([], [], []) == [] and score_rows([], [], []) == []


RULES: list[dict[str, float]] = [
    {"temperature": 0.0},
    {},
    {"top_k": 1},
    {"top_k": 50},
    {"top_p": 0.9},
    {"top_p": math.nextafter(1, 0)},
    {"min_p": 0.1},
    {"top_p": 0.95, "top_k": 100, "min_p": 0.001},
]


@pytest.mark.parametrize("vocab", [1, 7, 63, 64, 65, 200, 4099])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.1, 0.5, 0.97, 1.0])
def test_what_is_not_allowed_is_as_if_impossible(vocab: int, share: float) -> None:
    """The same token as of a row in which the others' logits are minus infinity."""
    generator = np.random.default_rng(vocab)
    for spread in (0.01, 4.0):
        logits = (generator.standard_normal(vocab) * spread).astype(np.float32)
        logits[::5] = -np.inf
        allowed = generator.random(vocab) < share
        allowed[vocab // 4 : vocab // 2] = False  # whole blocks, where there are some
        left = np.where(allowed, logits, np.float32(-np.inf))
        samplings = [Sampling(**{"temperature": 0.8, **rules}) for rules in RULES for _ in range(12)]  # type: ignore[arg-type]
        numbers = [0.0, math.nextafter(1, 0), *generator.random(10)] * len(RULES)
        count = len(numbers)
        found = draw_rows([logits] * count, samplings, numbers, masks=[packed(allowed)] * count)
        if left.max() == -np.inf:
            assert found == [NOTHING] * count
        else:
            assert found == draw_rows([left] * count, samplings, numbers)


@given(FEW | FLOATS, st.randoms(use_true_random=False), SAMPLINGS, NUMBERS)
@settings(max_examples=250)
def test_masks_and_any_rules(values: list[float], chance: random.Random, sampling: Sampling, number: float) -> None:
    logits = np.array(values, np.float32)
    allowed = np.array([chance.random() < 0.5 for _ in values])
    left = np.where(allowed, logits, np.float32(-np.inf))
    (found,) = draw_rows([logits], [sampling], [number], masks=[packed(allowed)])
    assert found == (draw(left, sampling, number) if np.isfinite(left).any() else NOTHING)


def test_rows_with_and_without_masks() -> None:
    logits = np.random.default_rng(1).standard_normal((3, 100)).astype(np.float32)
    seventh = packed(np.arange(100) == 7)
    sampling, others = Sampling(temperature=1.0), [draw(row, Sampling(temperature=1.0), 0.3) for row in logits]
    found = draw_rows(list(logits), [sampling] * 3, [0.3] * 3, masks=[None, seventh, None])
    assert found == [others[0], 7, others[2]]
    with pytest.raises(ValueError, match="mask"):
        draw_rows([logits[0]], [sampling], [0.3], masks=[seventh[:-1]])
    with pytest.raises(ValueError, match="masks are not as many as there are rows"):
        draw_rows(list(logits), [sampling] * 3, [0.3] * 3, masks=[seventh])


def packed(allowed: np.ndarray) -> np.ndarray:
    """Bits; those behind the last token are set, and mean nothing."""
    return np.packbits(np.append(allowed, np.ones(-len(allowed) % 8, bool)), bitorder="little")
