import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.telemetry.states import chance_of_count, clumping, expert_states, tokens_to_tell


def states(counts: list[int], num_tokens: int, top_k: int = 1, **more: float) -> list[str]:
    return [expert.state for expert in expert_states(counts, num_tokens=num_tokens, top_k=top_k, **more)]


def test_shares_become_states():
    """8 experts of 1000 tokens: 125 are fair; dead below 12.5, cold below 62.5, oversized above 375."""
    assert states([0, 12, 13, 62, 63, 125, 349, 376], 1000) == [
        "dead", "dead", "cold", "cold", "fair", "fair", "fair", "oversized",
    ]  # fmt: skip


def test_what_a_fair_router_does_is_not_called_ill():
    """An expert that nobody chose in a small batch may be fair: with 64 experts, 8 a token, 66 tokens are needed."""
    needed = tokens_to_tell(64, 8)
    assert needed == math.ceil(math.log(64 / 0.01) / -math.log(1 - 8 / 64)) == 66
    even = [9] * 24 + [8] * 39  # 528 rows of 66 tokens
    assert states([0, *even], needed, 8)[0] == "dead"
    few = [2] * 63
    assert states([0, *few], 16, 8) == ["unknown"] + ["fair"] * 63
    assert states([0, 0, 0], 0) == ["unknown"] * 3


def test_a_fair_router_rarely_raises_an_alarm():
    """1000 draws of few tokens: at most 1 % of the layers may hold an expert that is called ill."""
    generator = np.random.default_rng(0)
    for num_tokens in (10, 40, 160):
        draws = generator.multinomial(num_tokens, [1 / 16] * 16, size=1000)
        alarms = sum(bool({"dead", "cold", "oversized"} & set(states(list(counts), num_tokens))) for counts in draws)
        assert alarms <= 10, num_tokens


def test_the_bound_is_exact_of_none_and_holds_for_the_binomial_tail():
    assert chance_of_count([0], 50, 0.1)[0] == pytest.approx(0.9**50)
    tail = sum(math.comb(40, k) * 0.25**k * 0.75 ** (40 - k) for k in range(4))
    assert tail <= chance_of_count([3], 40, 0.25)[0] < 30 * tail
    assert chance_of_count([10], 40, 0.25)[0] == 1


@given(st.integers(1, 40), st.integers(2, 8))
def test_text_that_repeats_itself_says_less(times, num_experts):
    """Each token said `times` times in its window: the design effect finds the factor, and states become unknown."""
    generator = np.random.default_rng(times)
    counts = times * generator.multinomial(50, [1 / num_experts] * num_experts, size=400)
    assert clumping(counts, [50 * times] * 400) == pytest.approx(times, rel=0.2)
    assert clumping(counts[:1], [50 * times]) == 1
    assert clumping(np.zeros((3, 4)), [0, 0, 0]) == 1


def test_clumped_rows_are_judged_by_what_they_are_worth():
    counts = [0, 100, 100, 100]
    assert states(counts, 300)[0] == "dead"
    assert states(counts, 300, clumping=30.0)[0] == "unknown"


def test_few_experts_cannot_be_three_times_too_large():
    """Of 4 experts, 2 a token, the most is twice the fair share: nine tenths of the way counts."""
    assert states([100, 34, 33, 33], 100, 2)[0] == "oversized"
    assert states([85, 39, 38, 38], 100, 2)[0] == "fair"
