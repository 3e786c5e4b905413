import itertools

import numpy as np
import pytest

from moesaic.errors import ConfigError
from moesaic.serve.loadtest.workload import Workload, planned


def take(workload: Workload, count: int = 2000) -> list:
    return list(itertools.islice(planned(workload, 1.0), count))


def test_the_same_seed_asks_the_same() -> None:
    first, again = (take(Workload(rate=2.0, seconds=9, seed=5)) for _ in range(2))
    assert first == again
    assert first != take(Workload(rate=2.0, seconds=9, seed=6))


def test_arrivals_are_poisson() -> None:
    gaps = np.diff([0.0, *(each.at_s for each in take(Workload(rate=4.0, seconds=9)))])
    assert np.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert np.std(gaps) == pytest.approx(0.25, rel=0.1)  # of an exponential, mean and deviation are the same


def test_lengths_are_like_conversations() -> None:
    found = take(Workload(requests=2000))
    assert np.median([len(each.prompt.split()) for each in found]) == pytest.approx(93, rel=0.15)
    assert np.median([each.output_tokens for each in found]) == pytest.approx(115, rel=0.15)
    assert max(each.output_tokens for each in found) <= 1024


def test_prefixes_are_shared() -> None:
    workload = Workload(requests=200, prompt_tokens=10, output_tokens=5, prefix_tokens=50, prefixes=3)
    found = list(planned(workload, tokens_per_word=2.0))
    assert len({" ".join(each.prompt.split()[:25]) for each in found}) == 3
    assert {len(each.prompt.split()) for each in found} == {30}
    assert len({each.prompt for each in found}) > 190


def test_some_clients_leave() -> None:
    found = take(Workload(requests=2000, output_tokens=20, leave=0.25))
    left = [each.leaves_after for each in found if each.leaves_after is not None]
    assert len(left) / len(found) == pytest.approx(0.25, abs=0.05)
    assert all(1 <= each < 20 for each in left)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "say when the load ends"),
        ({"requests": 0}, "requests=0; use more than 0"),
        ({"requests": 1, "rate": -1.0}, "rate=-1.0; use more than 0"),
        ({"requests": 1, "prompt_tokens": 0}, "prompt_tokens=0"),
        ({"requests": 1, "leave": 1.5}, "leave=1.5"),
    ],
    ids=["no end", "no requests", "rate", "prompt", "leave"],
)
def test_impossible_workloads(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Workload(**fields)
