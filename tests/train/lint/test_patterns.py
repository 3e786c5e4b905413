"""The routing that lint dictates."""

from types import SimpleNamespace
from typing import Any

import pytest

from moesaic.train.lint.patterns import graded
from moesaic.train.lint.report import NotMeasured


def stand(num_tokens: int, top_k: int, num_experts: int) -> Any:
    return SimpleNamespace(num_tokens=num_tokens, top_k=top_k, num_experts=num_experts)


@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(64, 1, 4), (64, 2, 8), (13, 2, 8), (40, 3, 7)])
def test_one_kind_is_a_little_under_the_mean_and_one_over_it(num_tokens: int, top_k: int, num_experts: int) -> None:
    counts = graded(stand(num_tokens, top_k, num_experts), 0.65)
    loads = [sum(counts[(expert - back) % num_experts] for back in range(top_k)) for expert in range(num_experts)]
    mean = num_tokens * top_k / num_experts
    assert sum(counts) == num_tokens
    assert all(0 < load < mean for load in loads[top_k : 2 * top_k]) and loads[0] > mean


@pytest.mark.parametrize(
    ("shape", "said"),
    [((64, 2, 4), "2 of 4 experts, too many"), ((12, 1, 8), "12 tokens is too small .* give 25 tokens or more")],
)
def test_what_cannot_be_dictated_is_told(shape: tuple[int, int, int], said: str) -> None:
    with pytest.raises(NotMeasured, match=said):
        graded(stand(*shape), 0.65)
    if "more" in said:
        assert graded(stand(25, *shape[1:]), 0.65)
