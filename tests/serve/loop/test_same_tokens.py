"""The same request gets the same tokens and text: alone, beside others, with a prefix that others have computed, after
it gave way to others and went on, and with drafts."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic.engine.sampling import Sampling
from moesaic.serve.request import Request
from tests.serve.runners import KINDS, SAMPLED, HalfRight, Outcome, Stepped, alone, engine_of, outcome, prompt_of

CROWD = [(0, 3), (70, 5), (70, 5), (130, 1), (96, 40), (33, 8), (64, 1), (0, 90)]  # tokens in common, and own ones


def crowd(sampling: Sampling) -> list[Request]:
    return [
        Request(prompt_ids=prompt_of(common, own, seed), max_new_tokens=(12, 70, 30, 90)[seed % 4], sampling=sampling)
        for seed, (common, own) in enumerate(CROWD)
    ]


_wanted: dict[str, Outcome] = {}


def wanted(case: str, request: Request, **options: Any) -> Outcome:
    key = repr((case, request, options))
    if key not in _wanted:
        _wanted[key] = alone(case, request, **options)
    return _wanted[key]


def assert_same(found: list[Outcome], case: str, requests: list[Request], **options: Any) -> None:
    for one, request in zip(found, requests, strict=True):
        tokens, text, last = wanted(case, request, **options)
        assert (one.tokens, one.text, one.last.reason) == (tokens, text, last.reason)
        assert len(tokens) == request.max_new_tokens


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("case", KINDS)
class TestTheSame:
    def test_alone_is_what_the_engine_writes(self, case: str, sampling: Sampling) -> None:
        if sampling == Sampling():
            for request in crowd(sampling)[:3]:
                tokens = engine_of(case).generate(request.prompt_ids, request.max_new_tokens, eos_token_ids=())
                assert wanted(case, request).tokens == tokens

    def test_in_a_batch_of_32(self, case: str, sampling: Sampling) -> None:
        requests = 4 * crowd(sampling)
        stepped = Stepped(engine_of(case), share_prefixes=False, max_running=32)
        assert_same(stepped.run(requests), case, requests)
        assert stepped.runner.scheduler.hits == stepped.runner.scheduler.preemptions == 0

    def test_with_prefixes_of_others(self, case: str, sampling: Sampling) -> None:
        stepped = Stepped(engine_of(case), step_tokens=40, max_running=40)
        assert_same(stepped.run(crowd(sampling)), case, crowd(sampling))
        found = stepped.run(crowd(sampling))
        assert_same(found, case, crowd(sampling))
        assert [one.last.usage.cached_tokens for one in found] == [0, 64, 64, 128, 128, 32, 64, 64]

    def test_after_giving_way(self, case: str, sampling: Sampling) -> None:
        stepped = Stepped(engine_of(case), cache_tokens=7 * 32, step_tokens=24, max_running=5)
        assert_same(stepped.run(crowd(sampling)), case, crowd(sampling))
        assert stepped.runner.scheduler.preemptions > 0
        assert stepped.runner.scheduler.prefixes.evictions > 0

    def test_with_drafts(self, case: str, sampling: Sampling) -> None:
        requests = crowd(sampling)
        drafter = HalfRight({request.prompt_ids: wanted(case, request).tokens for request in requests})
        stepped = Stepped(engine_of(case), drafter, cache_tokens=9 * 32, step_tokens=48, max_running=6)
        found = stepped.run(requests)
        assert_same(found, case, requests)
        counts = stepped.runner.counts
        assert 0 < counts["accepted"] < counts["drafted"]
        assert sum(one.last.usage.accepted for one in found) == counts["accepted"]


@pytest.mark.parametrize("cache_format", ["bf16", "int8"])
def test_in_few_bits_on_two_threads(cache_format: str) -> None:
    options: dict[str, Any] = {"bits": 4, "threads": 2, "cache_format": cache_format}
    stepped = Stepped(engine_of(KINDS[0], **options), cache_tokens=7 * 32, step_tokens=24, max_running=5)
    assert_same(stepped.run(crowd(SAMPLED)), KINDS[0], crowd(SAMPLED), **options)


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, len(CROWD) - 1),
        st.integers(0, 25),  # the step that it comes before
        st.integers(0, 2),  # priority
        st.sampled_from("ab"),
        st.none() | st.integers(0, 30),  # steps until it is cancelled
    ),
    min_size=1,
    max_size=9,
)


def assert_same_whatever_comes(arrivals: list[tuple], case: str, **limits: int) -> None:
    sampled = crowd(SAMPLED)
    drafter = HalfRight({request.prompt_ids: wanted(case, request).tokens for request in sampled})
    stepped = Stepped(engine_of(case), drafter, cache_tokens=7 * 32, **limits)
    coming = sorted(arrivals, key=lambda arrival: arrival[1])
    taken: dict[int, int] = {}
    ends: dict[int, int] = {}
    now = 0
    while coming or stepped.runner.busy:
        while coming and coming[0][1] <= now:
            which, _, priority, client, lasts = coming.pop(0)
            number = stepped.add(with_place(sampled[which], priority, client))
            taken[number] = which
            if lasts is not None:
                ends[number] = now + lasts
        for number in [number for number, end in ends.items() if end <= now]:
            stepped.end(number)
            del ends[number]
        if stepped.runner.busy:
            stepped.step()
        now += 1
    for number, which in taken.items():
        tokens, text, last = outcome(stepped.events[number])
        whole = wanted(case, sampled[which])
        assert tokens == whole.tokens[: len(tokens)] and whole.text.startswith(text.rstrip("�"))
        assert last.reason == "cancelled" or (tokens, text) == whole[:2]


def with_place(request: Request, priority: int, client: str) -> Request:
    return Request(
        prompt_ids=request.prompt_ids,
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        priority=priority,
        client=client,
    )


@given(ARRIVALS, st.integers(6, 70), st.integers(1, 6))
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_comes_beside_it(arrivals: list[tuple], step_tokens: int, max_running: int) -> None:
    assert_same_whatever_comes(arrivals, KINDS[0], step_tokens=step_tokens, max_running=max_running)


@pytest.mark.slow
@pytest.mark.parametrize("case", KINDS)
@given(ARRIVALS, st.integers(6, 70), st.integers(1, 6))
@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_comes_beside_it_at_length(
    case: str, arrivals: list[tuple], step_tokens: int, max_running: int
) -> None:
    assert_same_whatever_comes(arrivals, case, step_tokens=step_tokens, max_running=max_running)
