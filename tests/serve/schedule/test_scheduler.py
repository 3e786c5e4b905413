"""The scheduler: every request ends, whatever the others are, and every token sees what is its own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.engine.cache import BLOCK_TOKENS
from moesaic.errors import ConfigError
from moesaic.serve.schedule.prefix_cache import PrefixCache, num_blocks
from moesaic.serve.schedule.scheduler import Scheduler
from tests.serve.simulated import Simulation, Wish

BLOCKS = 8
PREFIX = tuple(range(100, 100 + BLOCKS * BLOCK_TOKENS))


@st.composite
def wishes(draw: st.DrawFn) -> Wish:
    """Prompts with beginnings in common, which with their new tokens just fit in the cache, or are shorter."""
    common = draw(st.integers(0, (BLOCKS - 2) * BLOCK_TOKENS))
    own = draw(st.integers(1, 2 * BLOCK_TOKENS - 1))
    tail = draw(st.integers(1, 3))
    num_new = draw(st.integers(1, BLOCKS * BLOCK_TOKENS - common - own))
    return Wish(
        prompt=PREFIX[:common] + tuple(range(tail, tail + own)),
        num_new=min(num_new, draw(st.sampled_from([1, 3, 40, 300]))),
        step=draw(st.integers(0, 12)),
        priority=draw(st.integers(0, 2)),
        client=draw(st.sampled_from("ab")),
        shares=draw(st.integers(0, 4)) > 0,
    )


@given(st.lists(wishes(), min_size=1, max_size=8), st.integers(1, 5), st.integers(5, 90))
@settings(max_examples=120)
def test_every_request_ends(given_wishes: list[Wish], max_running: int, step_tokens: int) -> None:
    simulation = Simulation(num_blocks=BLOCKS, step_tokens=step_tokens, max_running=max_running)
    jobs = simulation.run(given_wishes)
    assert sorted(job.number for job in simulation.ended) == sorted(job.number for job in jobs)
    for job, wish in zip(jobs, given_wishes, strict=True):
        assert len(job.token_ids) == len(wish.prompt) + wish.num_new
    simulation.prefixes.clear()
    assert simulation.cache.num_free == BLOCKS  # nobody holds any


@given(st.lists(wishes(), min_size=2, max_size=8), st.integers(1, 5), st.integers(5, 90))
@settings(max_examples=60)
def test_the_most_important_that_runs_goes_on_in_every_step(
    given_wishes: list[Wish], max_running: int, step_tokens: int
) -> None:
    simulation = Simulation(num_blocks=BLOCKS, step_tokens=step_tokens, max_running=max_running)
    for wish in given_wishes:
        simulation.add(wish)
    while simulation.busy:
        first = min((job.rank for job in simulation.scheduler.running), default=None)
        shares = simulation.step()
        assert shares
        if first is not None:
            assert min(job.rank for job, _ in shares) <= first


def test_newest_tokens_go_before_prompts() -> None:
    simulation = Simulation(num_blocks=20, step_tokens=10)
    writing = simulation.add(Wish((1, 2), 9))
    simulation.step()
    reading = simulation.add(Wish(tuple(range(50)), 1))
    assert [(job, count) for job, count in simulation.step()] == [(writing, 1), (reading, 9)]


def test_scored_prompts_share_the_rows_of_a_step() -> None:
    """Logits of all their tokens are in memory together: the bound is of the step, not of each prompt."""
    simulation = Simulation(num_blocks=20, step_tokens=60)
    simulation.scheduler.scored_tokens = 24
    jobs = [simulation.add(Wish(tuple(range(start, start + 20)), 1, shares=False)) for start in (0, 100, 200)]
    jobs[0].scored = jobs[1].scored = True
    assert simulation.step() == [(jobs[0], 20), (jobs[1], 4), (jobs[2], 20)]


def test_clients_take_turns() -> None:
    simulation = Simulation(num_blocks=40, max_running=1)
    wishes_of = [("many", 4), ("few", 2), ("one", 1)]
    simulation.run([Wish((number,), 2, client=name) for name, count in wishes_of for number in range(1, count + 1)])
    assert [job.client for job in simulation.ended] == ["many", "few", "one", "many", "few", "many", "many"]


def test_a_more_important_request_takes_a_place() -> None:
    simulation = Simulation(num_blocks=20, max_running=2)
    plain = [simulation.add(Wish((number,), 30)) for number in (1, 2)]
    simulation.step()
    urgent = simulation.add(Wish((9,), 3, priority=-1))
    assert {job for job, _ in simulation.step()} == {plain[0], urgent}
    while simulation.busy:
        simulation.step()
    assert simulation.ended == [urgent, *plain]
    assert simulation.scheduler.preemptions == 1


def test_the_latest_gives_way_when_the_cache_is_full_and_goes_on_from_where_it_was() -> None:
    simulation = Simulation(num_blocks=6, max_running=3)
    wishes_ = [Wish(tuple(range(number, number + 40)), 100) for number in (1000, 2000, 3000)]
    jobs = simulation.run(wishes_)
    assert simulation.ended == jobs
    assert simulation.scheduler.preemptions == 1
    assert simulation.computed[jobs[0]] == 139


def test_who_gives_way_takes_no_block_of_the_step() -> None:
    simulation = Simulation(num_blocks=3, max_running=1)
    plain = simulation.add(Wish(tuple(range(BLOCK_TOKENS)), 5, priority=1))
    simulation.step()
    assert plain.left == 1  # the next step would take a second block for it
    urgent = simulation.add(Wish(tuple(range(500, 500 + 3 * BLOCK_TOKENS - 2)), 2))
    assert simulation.step() == [(urgent, 64)]  # and needs all three: `step` compares what is planned and taken
    while simulation.busy:
        simulation.step()
    assert simulation.ended == [urgent, plain]


@given(st.lists(wishes(), min_size=2, max_size=6), st.integers(2, 4), st.integers(5, 90), st.data())
@settings(max_examples=40)
def test_drafts_and_requests_that_leave_keep_the_accounts(
    given_wishes: list[Wish], max_running: int, step_tokens: int, data: st.DataObject
) -> None:
    simulation = Simulation(num_blocks=BLOCKS, step_tokens=step_tokens, max_running=max_running)
    jobs = [simulation.add(wish) for wish in given_wishes]
    scheduler = simulation.scheduler
    for _ in range(data.draw(st.integers(1, 12))):
        leaving = data.draw(st.sampled_from([None, *jobs]))
        if leaving is not None:
            scheduler.end(leaving)
            jobs.remove(leaving)
        if not jobs:
            return
        for job, count in scheduler.plan():
            spare = scheduler.spare_tokens, scheduler.spare_blocks
            wanted = data.draw(st.integers(1, 40))
            needed = num_blocks(job.text.length + count + wanted) - num_blocks(job.text.length + count)
            fits = wanted <= spare[0] and needed <= spare[1]
            assert scheduler.add_drafts(job, wanted) == fits
            after = scheduler.spare_tokens, scheduler.spare_blocks
            assert after == (spare[0] - wanted * fits, spare[1] - needed * fits)
        simulation.step()
        jobs = [job for job in jobs if job not in simulation.ended]


def test_one_prefix_is_computed_once() -> None:
    simulation = Simulation(num_blocks=200, step_tokens=256, max_running=50)
    prefix = tuple(range(1000))
    jobs = simulation.run([Wish((*prefix, 5000 + number), 3) for number in range(50)])
    shared = 1000 // BLOCK_TOKENS * BLOCK_TOKENS
    assert [job.cached for job in jobs] == [0] + [shared] * 49
    assert sum(simulation.computed.values()) == 1000 + 3 + 49 * (1000 - shared + 3)
    assert simulation.scheduler.hits == 49


def test_a_prefix_is_computed_by_another_when_its_first_is_gone() -> None:
    simulation = Simulation(num_blocks=40, step_tokens=64)
    first, second, third = (simulation.add(Wish((*range(300), 5000 + number), 2)) for number in range(3))
    simulation.step()
    assert (first.runs, second.runs, third.runs) == (True, False, False)
    simulation.scheduler.end(first)
    simulation.step()
    assert (second.runs, third.runs) == (True, False)
    assert second.cached == 64
    while simulation.busy:
        simulation.step()
    assert third.cached == 288


def test_nobody_waits_for_one_who_is_less_important() -> None:
    simulation = Simulation(num_blocks=40, step_tokens=64)
    slow = simulation.add(Wish((*range(300), 1), 2, priority=5))
    simulation.step()
    urgent = simulation.add(Wish((*range(300), 2), 2))
    assert {job for job, _ in simulation.step()} == {urgent}
    while simulation.busy:
        simulation.step()
    assert simulation.ended == [urgent, slow]


def test_drafts_take_nobodys_place() -> None:
    simulation = Simulation(num_blocks=3, step_tokens=40)
    one = simulation.add(Wish(tuple(range(30)), 60))
    other = simulation.add(Wish(tuple(range(500, 530)), 60))
    for _ in range(2):
        simulation.step()
    scheduler = simulation.scheduler
    assert {job for job, _ in scheduler.plan()} == {one, other}
    assert not scheduler.add_drafts(one, 39)  # more than a step's tokens
    assert scheduler.add_drafts(one, 10)  # the last block
    assert not scheduler.add_drafts(other, 10)
    assert scheduler.add_drafts(other, 1)  # in the block that it has
    assert scheduler.spare_tokens == 40 - 2 - 11


def test_blocks_needed() -> None:
    assert [num_blocks(count) for count in (0, 1, BLOCK_TOKENS, BLOCK_TOKENS + 1)] == [0, 1, 1, 2]


def test_a_step_has_a_token_for_each() -> None:
    prefixes = PrefixCache(Simulation(num_blocks=4).cache)
    with pytest.raises(ConfigError, match="steps of 3 tokens for 4 requests"):
        Scheduler(prefixes, step_tokens=3, max_running=4)


def test_only_as_many_give_way_as_have_to() -> None:
    simulation = Simulation(num_blocks=8, step_tokens=100, max_running=3)
    first = simulation.add(Wish(tuple(range(63)), 40))
    last = simulation.add(Wish(tuple(range(500, 595)), 60))
    simulation.step()
    simulation.step()
    assert (first.text.length, last.text.length) == (64, 95)
    urgent = simulation.add(Wish(tuple(range(900, 1020)), 3, priority=-1))
    shares = dict(simulation.step())
    assert not last.runs
    assert shares == {first: 1, urgent: 99}
    while simulation.busy:
        simulation.step()
    assert simulation.ended == [urgent, first, last]
