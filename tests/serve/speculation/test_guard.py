"""The guard, over simulated steps: what drafts cost and how often they are right is given, and the time is added up."""

import random
import statistics
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.engine.cache import Text
from moesaic.plan.routing import distinct_experts
from moesaic.serve.choice.writing import Writing
from moesaic.serve.request import Request
from moesaic.serve.seen import StepSeen
from moesaic.serve.speculation.drafter import Drafter, Wanted
from moesaic.serve.speculation.guard import Account, Guard
from moesaic.serve.speculation.times import StepTimes, bytes_touched
from tests.serve.runners import KINDS, model_of

LENGTH = 256  # the shortest texts for which the guard promises anything
Right = Callable[[int], float]  # how likely a draft is right, by its place in the text


def sparse(num_tokens: int) -> float:
    """A step that mostly reads 8 of 128 experts for each token."""
    return 0.3 + 0.7 * distinct_experts(128, 8, num_tokens) / 8 + 0.02 * num_tokens


def dense(num_tokens: int) -> float:
    return 1.0 + 0.03 * num_tokens


class Simulated(Drafter):
    """Texts whose token at place i is i. A draft is right with a given probability, and takes so many seconds."""

    def __init__(self, right: Right, *, guess_s: float, chance: random.Random) -> None:
        self.right, self.free = right, not guess_s
        self.now_s = 0.0
        self._guess_s, self._chance = guess_s, chance

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [self._of(len(each.writing.token_ids), min(each.room, 6)) for each in wanted]

    def _of(self, place: int, room: int) -> list[int]:
        self.now_s += self._guess_s * room
        return [at if self._chance.random() < self.right(at) else -1 for at in range(place, place + room)]


def seconds(
    times: Callable[[int], float],
    right: Right,
    *,
    texts: int = 1,
    guess: float = 0.0,
    formula: Callable[[int], float] | None = None,
    seed: int = 5,
) -> float:
    """Of a run in which every text is written to its end, over the seconds without drafts.

    guess: what a draft takes to make, in steps of one token. formula: what the guard takes steps for before it has seen
    them.
    """
    chance, clock = random.Random(seed), 1e-3  # a step's time, in seconds
    drafter = Simulated(right, guess_s=guess * clock * times(1), chance=chance)
    guard = Guard(drafter, StepTimes(formula or times), lambda: drafter.now_s)
    writings = [Writing(Request(prompt_ids=(0,), max_new_tokens=LENGTH), lambda ids: "", 9999) for _ in range(texts)]
    total = 0.0
    while writings:
        wanted = [Wanted(each, Text(), LENGTH - each.num_new - 1) for each in writings]
        drafts = guard.propose([each for each in wanted if each.room > 0])
        drafts += [[]] * (len(wanted) - len(drafts))
        num_drafts = sum(map(len, drafts))
        step_s = clock * times(len(writings) + num_drafts) * chance.uniform(0.95, 1.1)
        guard.hear(StepSeen(len(writings) + num_drafts, step_s, (), num_drafts))
        total += step_s
        for each, drafted in zip(writings, drafts, strict=True):
            place = len(each.token_ids)
            accepted = next((i for i, token in enumerate(drafted) if token != place + i), len(drafted))
            each.token_ids += range(place, place + accepted + 1)
        for each in [each for each in writings if each.num_new >= LENGTH - 1]:
            guard.forget(each)
            writings.remove(each)
    return (total + drafter.now_s) / (LENGTH * clock * times(texts) * 1.025)


@pytest.mark.parametrize("texts", [1, 4])
@pytest.mark.parametrize("guess", [0.0, 0.05], ids=["free", "costly"])
@pytest.mark.parametrize("times", [sparse, dense])
@pytest.mark.parametrize(
    "right",
    [
        lambda place: 0.0,
        lambda place: 0.2,
        lambda place: 0.5,
        lambda place: float(place % 2),
        lambda place: float(place // 32 % 2),
        lambda place: float(place < 40),
    ],
    ids=["never", "a fifth", "half", "every other", "by turns", "at first"],
)
def test_never_much_slower(right: Right, times: Callable[[int], float], guess: float, texts: int) -> None:
    assert seconds(times, right, guess=guess, texts=texts) < 1 / 0.97


@settings(max_examples=60)
@given(
    fixed=st.floats(0.0, 4.0),
    per_expert=st.floats(0.0, 4.0),
    per_token=st.floats(0.01, 1.0),
    formula=st.sampled_from([sparse, dense]),
    rates=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    texts=st.sampled_from([1, 2, 3, 8]),
    guess=st.sampled_from([0.0, 0.0, 0.02, 0.2]),
    seed=st.integers(0, 99),
)
def test_never_much_slower_whatever_steps_take(
    fixed: float,
    per_expert: float,
    per_token: float,
    formula: Callable[[int], float],
    rates: list[float],
    texts: int,
    guess: float,
    seed: int,
) -> None:
    """Steps that take other times than the formula says, drafts that are right more or less often as a text goes on."""

    def times(size: int) -> float:
        return fixed + per_expert * distinct_experts(32, 4, size) / 4 + per_token * size

    def right(place: int) -> float:
        return rates[min(len(rates) - 1, place * len(rates) // LENGTH)]

    assert seconds(times, right, texts=texts, guess=guess, formula=formula, seed=seed) < 1 / 0.97


@pytest.mark.parametrize(("times", "guess", "gain"), [(sparse, 0.0, 1.05), (dense, 0.0, 3.0), (dense, 0.02, 2.0)])
def test_faster_where_drafts_are_right(times: Callable[[int], float], guess: float, gain: float) -> None:
    assert seconds(times, lambda place: 0.97, guess=guess) < 1 / gain


def test_faster_where_a_part_is_copied() -> None:
    """Half of a text's drafts come in long runs that are right, as in an edit, the others hardly ever are."""
    texts = [seconds(dense, lambda place: 0.97 if place // 40 % 2 else 0.1, formula=sparse, seed=i) for i in range(20)]
    assert statistics.fmean(texts) < 1 / 1.25


def test_in_a_long_rest_nothing_is_guessed_but_near_its_end() -> None:
    drafter = Simulated(lambda place: 1.0, guess_s=0.0, chance=random.Random(0))
    guard = Guard(drafter, StepTimes(sparse), lambda: 0.0)
    writing = Writing(Request(prompt_ids=(0,), max_new_tokens=99), lambda ids: "", 999)
    guard.times.observe(1, 1.0)
    guard.propose([Wanted(writing, Text(), 9)])
    account = guard._accounts[writing]
    account.rest = 40
    asked = []
    for place in range(1, 30):
        writing.token_ids.append(place)
        assert guard.propose([Wanted(writing, Text(), 9)]) == [[]]
        asked.append(bool(account.guessed))
    assert asked == [rest <= 16 for rest in range(39, 10, -1)]


def test_drafts_that_lose_are_given_up_for_longer_each_time() -> None:
    account = Account()
    rests = []
    for _ in range(5):
        account.settle(0.0, 1.0)
        rests.append(account.rest)
    assert rests == [1, 2, 4, 8, 16]
    account.settle(2.0, 1.0)
    assert account.setback == 8


def test_the_time_of_steps_is_learned() -> None:
    times = StepTimes(lambda size: sparse(size) - 0.02 * size)
    for size in (1, 2, 5, 1, 9, 24):
        for _ in range(5):
            times.observe(size, 0.05 * sparse(size))
    for size in (1, 3, 4, 7, 16, 40):
        assert times.predict(size) == pytest.approx(0.05 * sparse(size), rel=0.05)
    times.observe(3, 100.0)
    assert times.predict(3) < 0.3, "a step that was held up"


def test_bytes_of_a_step() -> None:
    """All experts of a layer at the most, and the rest in any case."""
    config = model_of(KINDS[0]).config
    touched = bytes_touched(config, {"experts": 1000, "attention": 50, "head": 7})
    assert touched(1) == pytest.approx(57 + 1000 * 2 / 5) and touched(64) == pytest.approx(1057, abs=1)
    assert bytes_touched(config, {"attention": 50})(3) == 50
