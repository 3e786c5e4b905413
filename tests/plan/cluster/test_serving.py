"""Serving: whatever happens, requests, tokens and bytes are somewhere."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.plan.cluster.outcome import outcome, requests_by_place
from moesaic.plan.cluster.requests import ARRIVALS, Workload
from moesaic.plan.cluster.serving import Pools, Prefill, Request, Serving
from moesaic.plan.cluster.troubles import Troubles
from tests.plan.cluster.cluster_models import unit

UNITS = {new: unit(new=new) for new in (1, 2)}
WORKLOADS = st.builds(
    Workload,
    rate=st.sampled_from([100.0, 1000.0]),
    prompt=st.sampled_from([64.0, 512.0]),
    output=st.sampled_from([16.0, 128.0]),
    spread=st.sampled_from([0.0, 0.8]),
    cached=st.sampled_from([0.0, 0.5]),
    arrivals=st.sampled_from(sorted(ARRIVALS)),
)
TROUBLES = st.builds(
    Troubles,
    hours_between=st.sampled_from([0.0, 1e-4, 1e-3]),
    repair_s=st.sampled_from([0.0, 0.05]),
    slow_share=st.sampled_from([0.0, 0.3]),
    slowdown=st.sampled_from([1.0, 1.5]),
)


def pools(*, new: int = 1, prefills: int = 2, decodes: int = 2) -> Pools:
    tokens = 1.0 if new == 1 else 1.6
    return Pools(
        prefill=UNITS[1], decode=UNITS[new], prefills=prefills, decodes=decodes, chunk=512, tokens_per_step=tokens
    )


def living(run: Serving) -> list[tuple[Request, float]]:
    """Every unfinished request, and how many tokens of it are written."""
    batches = [unit.batch for unit in run.prefills]
    moving = [event.about[0] for event in run.clock.coming if event.kind == "moved"]
    waiting = [*run.to_read, *run.to_write, *moving, *(request for batch in batches for request in batch)]
    tokens = run.pools.tokens_per_step
    writing = [
        (request, request.written + (each.steps - request.joined) * tokens)
        for each in run.decodes
        for _, _, request in each.leaving
    ]
    return [*((request, request.written) for request in waiting), *writing]


@settings(max_examples=10)
@given(WORKLOADS, TROUBLES, st.sampled_from([1, 2]), st.integers(0, 3))
def test_nothing_is_lost(workload: Workload, troubles: Troubles, new: int, seed: int) -> None:
    run = Serving(pools(new=new), workload, troubles, seconds=0.15, seed=seed).run()
    ledger, places = run.ledger, requests_by_place(run)
    alive = living(run)
    begun = places["warm"] + places["came"]
    assert begun == places["finished"] + len(alive)
    assert begun == sum(count for place, count in places.items() if place not in ("warm", "came"))
    assert np.isclose(ledger.written + ledger.written_before, ledger.finished_tokens + sum(each for _, each in alive))
    in_flight = sum(event.about[1] for event in run.clock.coming if event.kind == "moved")
    assert np.isclose(ledger.bytes_sent, ledger.bytes_received + in_flight)
    for each in run.decodes:
        assert (each.reserved_G <= each.room).all() and each.texts == each.texts_G.sum() == len(each.leaving)
        own = {id(request) for _, _, request in each.leaving}
        seen = sum(request.prompt + written for request, written in alive if id(request) in own)
        assert np.isclose(each.cached_G.sum(), seen) and each.load == each.reserved_G.sum()


def test_a_lone_request_takes_what_the_steps_take() -> None:
    workload = Workload(rate=1.0, prompt=256, output=9, spread=0.0, arrivals="even")
    run = Serving(pools(prefills=1, decodes=1), workload, Troubles(), seconds=1.9)
    run._warm_up = lambda: None
    result = outcome(run.run())
    prefill, decode = UNITS[1].prefill(256 / 4, 256), UNITS[1].decode(1, 260)
    assert result.requests["finished"] == 1 and run.ledger.written == 9
    assert result.first_token_s["p50"] >= prefill.working
    assert result.between_tokens_s["p50"] == pytest.approx(decode.seconds, rel=0.3)


def test_more_users_write_more_and_wait_longer() -> None:
    few, many = (
        outcome(Serving(pools(), Workload(rate=rate, prompt=256, output=64), Troubles(), seconds=0.2).run())
        for rate in (200.0, 10000.0)
    )
    assert many.output_per_s > 2 * few.output_per_s
    assert many.between_tokens_s["p50"] >= few.between_tokens_s["p50"]
    assert many.first_token_s["p50"] > few.first_token_s["p50"]


def test_a_slow_device_slows_its_unit_and_failures_cost_work() -> None:
    workload = Workload(rate=2000.0, prompt=128, output=128)
    fine, slow, failing = (
        outcome(Serving(pools(), workload, troubles, seconds=0.25).run())
        for troubles in (
            Troubles(),
            Troubles(slow_share=1.0, slowdown=3.0),
            Troubles(hours_between=1e-4, repair_s=0.02),
        )
    )
    assert slow.between_tokens_s["p50"] > 1.5 * fine.between_tokens_s["p50"]
    assert failing.failures > 0 and failing.lost_state_bytes > 0
    assert failing.output_per_s < fine.output_per_s


def test_prompts_are_read_in_the_order_they_came() -> None:
    run = Serving(pools(prefills=1), Workload(rate=1.0, prompt=64), Troubles(), seconds=0.1)
    run._enqueue([Request(0.0, 2048, 1), Request(0.0, 1, 1), Request(0.0, 64, 1)])
    assert isinstance(run.prefills[0], Prefill)
    assert [request.prompt for request in run.prefills[0].batch] == [2048]
    assert [request.prompt for request in run.to_read] == [1, 64]


def test_weights_that_leave_no_room_are_refused() -> None:
    small = replace(UNITS[1], device=replace(UNITS[1].device, memory_bytes=1e6))
    with pytest.raises(ConfigError, match="use more ranks a unit, a narrower format, or devices with more memory"):
        _ = small.cache_tokens
