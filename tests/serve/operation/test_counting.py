"""Limits and counts of requests at a desk whose events are known."""

import asyncio
import json
import logging
import sys
from collections.abc import AsyncGenerator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moesaic.errors import GenerationError
from moesaic.serve.http.errors import ApiError
from moesaic.serve.operation.counting import CountedRuns, Pace
from moesaic.serve.operation.logs import _JsonLines, entry_of, text_of
from moesaic.serve.operation.metrics import Metrics, ModelState
from moesaic.serve.operation.notes import Notes, current
from moesaic.serve.operation.observing import Exchange
from moesaic.serve.operation.settings import Limits
from moesaic.serve.request import Event, Finished, Progress, Request, TokenInfo, Usage
from moesaic.serve.seen import Stats

REQUEST = Request(prompt_ids=(1, 2, 3), max_new_tokens=3)


class FakeDesk:
    """Three tokens, the last two together; `held` until it is let go or closed."""

    def __init__(self, *, held: bool = False) -> None:
        self.go, self.closed, self.requests = asyncio.Event(), False, []
        if not held:
            self.go.set()

    async def run(self, request: Request) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        yield Progress((TokenInfo(7),), "a")
        await self.go.wait()
        if self.closed:
            yield Finished("cancelled", Usage(3, 1))
            return
        yield Progress((TokenInfo(8), TokenInfo(9)), "bc")
        yield Finished("length", Usage(3, 3, cached_tokens=2))

    def stats(self) -> Stats:
        raise NotImplementedError

    async def close(self) -> None:
        self.closed = True
        self.go.set()


def counted(desk: FakeDesk, metrics: Metrics, **limits) -> CountedRuns:
    return CountedRuns("m", desk, limits=Limits(**limits), together=1, metrics=metrics, decode=lambda ids: str(ids))


def values(metrics: Metrics) -> dict[str, float]:
    """Samples of the exposition, as the official client reads it."""
    families = text_string_to_metric_families(metrics.exposition(ready=True).decode())
    return {sample.name: sample.value for family in families for sample in family.samples if "le" not in sample.labels}


async def all_of(runs: CountedRuns, request: Request = REQUEST) -> list[Event]:
    return [event async for event in runs.run(request)]


def test_everything_is_counted_once() -> None:
    metrics = Metrics()

    async def run() -> Notes:
        notes = Notes("req_1")
        current.set(notes)
        assert len(await all_of(counted(FakeDesk(), metrics))) == 3
        return notes

    notes = asyncio.run(run())
    found = values(metrics)
    assert found["moesaic_prompt_tokens_total"] == 3
    assert found["moesaic_cached_prompt_tokens_total"] == 2
    assert found["moesaic_generation_tokens_total"] == 3
    assert found["moesaic_time_to_first_token_seconds_count"] == 1
    assert found["moesaic_inter_token_seconds_count"] == 2
    assert found["moesaic_request_seconds_count"] == 1
    assert (notes.model, notes.completion_tokens, notes.finish, notes.texts) == ("m", 3, "length", ["abc"])
    assert notes.prompts == ["(1, 2, 3)"]


def test_each_time_between_tokens_is_counted_as_it_comes() -> None:
    """As clients see them: of two that come together the second has waited for nothing."""
    metrics, desk = Metrics(), FakeDesk()

    async def run() -> list[float]:
        counts = []
        async for _ in counted(desk, metrics).run(REQUEST):
            counts.append(values(metrics).get("moesaic_inter_token_seconds_count", 0.0))
        return counts

    assert asyncio.run(run()) == [0, 2, 2]
    buckets = [
        sample.value
        for family in text_string_to_metric_families(metrics.exposition(ready=True).decode())
        for sample in family.samples
        if sample.name == "moesaic_inter_token_seconds_bucket"
    ]
    assert buckets[0] >= 1 and buckets[-1] == 2


def test_one_more_than_may_wait_is_told_when_to_come_again() -> None:
    async def run() -> None:
        desk = FakeDesk(held=True)
        runs = counted(desk, Metrics(), queue=1)
        waiting = [asyncio.ensure_future(all_of(runs)) for _ in range(2)]
        while runs.inside < 2:
            await asyncio.sleep(0)
        with pytest.raises(ApiError) as caught:
            await all_of(runs)
        assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "10"})
        desk.go.set()
        await asyncio.gather(*waiting)
        assert len(await all_of(runs)) == 3  # there is room again

    asyncio.run(run())


def test_a_client_that_leaves_makes_room() -> None:
    async def run() -> None:
        runs = counted(FakeDesk(held=True), Metrics(), queue=0)
        events = runs.run(REQUEST)
        await anext(events)
        assert runs.inside == 1
        await events.aclose()
        assert runs.inside == 0

    asyncio.run(run())


def test_too_long_prompts() -> None:
    with pytest.raises(GenerationError, match="prompt of 3"):
        asyncio.run(all_of(counted(FakeDesk(), Metrics(), prompt_tokens=2)))


def test_every_request_has_a_time_limit() -> None:
    async def run() -> list[float | None]:
        desk = FakeDesk()
        runs = counted(desk, Metrics(), timeout_s=9)
        await all_of(runs)
        await all_of(runs, Request(prompt_ids=(1,), max_new_tokens=1, timeout_s=3))
        return [request.timeout_s for request in desk.requests]

    assert asyncio.run(run()) == [9, 3]


def test_at_the_end_requests_keep_what_they_have() -> None:
    async def run() -> list[Event]:
        desk = FakeDesk(held=True)
        runs = counted(desk, Metrics())
        task = asyncio.ensure_future(all_of(runs))
        while not runs.inside:
            await asyncio.sleep(0)
        await runs.end()
        return await task

    assert asyncio.run(run())[-1] == Finished("timeout", Usage(3, 1))


def test_pace_learns_how_long_requests_take() -> None:
    pace = Pace(together=4)
    for _ in range(200):
        pace.add(8.0)
    assert pace.wait_s(waiting=3) == pytest.approx(8.0, rel=0.01)
    assert pace.wait_s(waiting=10**6) == 120.0


def test_states_are_asked_for_at_each_scrape() -> None:
    metrics, state = Metrics(), [ModelState(running=2, waiting=5, cache_used=0.5, preemptions=3)]
    metrics.watch("m", lambda: state[0])
    found = values(metrics)
    assert (found["moesaic_running"], found["moesaic_waiting"], found["moesaic_cache_used"]) == (2, 5, 0.5)
    assert found["moesaic_preemptions_total"] == 3
    metrics.forget("m")
    assert "moesaic_running" not in values(metrics)


def exchange(**fields) -> Exchange:
    notes = Notes("req_1", model="m", prompt_tokens=3, completion_tokens=2, prompts=["secret"], texts=["answer"])
    return Exchange("POST", "/v1/completions", 200, 0.5, notes, "alice", "10.0.0.1")


def test_a_log_line_has_no_texts_unless_asked() -> None:
    entry = entry_of(exchange(), prompts=False)
    assert "secret" not in json.dumps(entry) + text_of(entry)
    assert (entry["id"], entry["model"], entry["key"], entry["completion_tokens"]) == ("req_1", "m", "alice", 2)
    with_texts = entry_of(exchange(), prompts=True)
    assert with_texts["prompts"] == ["secret"] and "answer" in text_of(with_texts)


def test_failures_are_lines_of_the_same_form() -> None:
    try:
        raise ValueError("deep inside")
    except ValueError:
        record = logging.LogRecord("moesaic.serve", logging.ERROR, "x.py", 1, "%s failed", ("it",), sys.exc_info())
    line = json.loads(_JsonLines().format(record))
    assert (line["level"], line["message"]) == ("error", "it failed") and "deep inside" in line["traceback"]
