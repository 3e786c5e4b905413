"""Requests through the loop: what the engine writes alone, whatever runs beside, from any thread."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from moesaic.engine.engine import Piece, Text
from moesaic.errors import ConfigError, GenerationError, QueueFullError, ServerClosingError
from moesaic.serve.loop.loop import Loop
from moesaic.serve.loop.settings import LoopSettings
from moesaic.serve.request import Event, Finished, Heard, Pooled, PoolingKind, Request
from moesaic.serve.seen import StepSeen
from tests.serve import tiny

PROMPTS = [tuple(range(3, 3 + size)) for size in (1, 7, 40, 300)]


class Served:
    """A loop that stands still while `held` is: before each step of the engine."""

    def __init__(self, **settings: Any) -> None:
        self.listener = tiny.Listener()
        self.engine = tiny.engine()
        self.held = threading.Lock()
        self.begun = threading.Event()
        self.engine.step = self._step(self.engine.step)  # type: ignore[method-assign]
        self.loop = Loop(self.engine, tiny.tokenizer().decode, self.listener, settings=LoopSettings(**settings))

    def _step(self, step):
        def held_step(pieces):
            self.begun.set()
            with self.held:
                return step(pieces)

        return held_step

    def reason(self, number: int) -> str:
        last = self.listener.wait(number)[-1]
        assert isinstance(last, Finished)
        return last.reason


@pytest.fixture
def served() -> Iterator[Served]:
    it = Served()
    yield it
    it.loop.close()


def request(size: int = 1, **fields) -> Request:
    return Request(prompt_ids=tuple(range(3, 3 + size)), **{"max_new_tokens": 3, **fields})


def test_writes_what_the_engine_writes(served: Served) -> None:
    alone = [tiny.engine().generate(prompt, 12) for prompt in PROMPTS]
    requests = [Request(prompt_ids=prompt, max_new_tokens=12) for prompt in PROMPTS]
    found = tiny.run(served.loop, served.listener, requests)
    assert [tiny.new_ids(events) for events in found] == alone
    assert [tiny.text_of(events) for events in found] == [tiny.tokenizer().decode(ids) for ids in alone]
    for events, prompt in zip(found, PROMPTS, strict=True):
        last = events[-1]
        assert isinstance(last, Finished) and last.reason == "length"
        assert last.usage[:2] == (len(prompt), 12)


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_vectors_are_those_of_the_prompt_alone(kind: PoolingKind) -> None:
    """In small pieces, beside texts that are written, and behind a prefix that another left."""
    asked = [Request(prompt_ids=prompt, max_new_tokens=0, pooling=kind) for prompt in PROMPTS]
    writes = [Request(prompt_ids=prompt, max_new_tokens=12) for prompt in PROMPTS]
    served = Served(step_tokens=48, max_running=8)
    try:
        mixed = [each for pair in zip(writes, asked, strict=True) for each in pair]
        first = [vector_of(events) for events in tiny.run(served.loop, served.listener, mixed)[1::2]]
        again = [vector_of(events) for events in tiny.run(served.loop, served.listener, asked)]
    finally:
        served.loop.close()
    for prompt, found_D, again_D in zip(PROMPTS, first, again, strict=True):
        engine = tiny.engine()
        engine.step([Piece(Text(), list(prompt))])
        hidden_TD = engine.hidden_states().double()
        expected_D = hidden_TD.mean(0) if kind == "mean" else hidden_TD[-1]
        assert np.array_equal(found_D, again_D)
        assert np.allclose(found_D, expected_D / expected_D.norm(), atol=1e-6)


def vector_of(events: Sequence[Event]) -> np.ndarray:
    (vector_D,) = (event.vector_D for event in events if isinstance(event, Pooled))
    return vector_D


def test_many_threads_ask_and_some_change_their_minds(served: Served) -> None:
    wanted = {size: tiny.engine().generate(range(3, 3 + size), 9) for size in (1, 7, 40)}
    asked: dict[int, tuple[int, bool]] = {}

    def ask(thread: int) -> None:
        for turn in range(12):
            size, cancels = (1, 7, 40)[(thread + turn) % 3], turn % 4 == thread % 4
            number = served.loop.submit(request(size, max_new_tokens=9, client=str(thread)))
            asked[number] = size, cancels
            if cancels:
                served.loop.cancel(number)
            served.loop.stats()

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 72
    for number, (size, cancels) in asked.items():
        tokens = tiny.new_ids(served.listener.wait(number))
        reason = served.reason(number)
        assert tokens == wanted[size][: len(tokens)]
        assert (reason, len(tokens)) == ("length", 9) or (cancels and reason == "cancelled")
    assert served.loop.drain(60)
    stats = served.loop.stats()
    assert (stats.requests, stats.queued, stats.running, stats.held_tokens) == (72, 0, 0, 0)


def test_a_cancelled_request_ends(served: Served) -> None:
    with served.held:
        number = served.loop.submit(request(max_new_tokens=500))
        served.loop.cancel(number)
    assert served.reason(number) == "cancelled"


def test_a_request_ends_when_its_time_is_over(served: Served) -> None:
    with served.held:
        served.loop.submit(request())
        served.begun.wait(60)
        late = served.loop.submit(request(max_new_tokens=500, timeout_s=0.0))
    assert served.reason(late) == "timeout"
    assert tiny.new_ids(served.listener.wait(late)) == []


def test_so_many_wait_and_no_more() -> None:
    served = Served(max_running=1, max_queued=2)
    with served.held:
        numbers = [served.loop.submit(request()) for _ in range(3)]
        with pytest.raises(QueueFullError, match="2 requests wait already, and no more may; come again later"):
            served.loop.submit(request())
    assert [served.reason(number) for number in numbers] == ["length"] * 3
    served.loop.drain(60)
    served.loop.close()


@pytest.mark.parametrize("queued", [True, False])
def test_drained_it_takes_nothing_new_and_ends_the_rest(queued: bool) -> None:
    served = Served(max_running=1)
    with served.held:
        numbers = [served.loop.submit(request()) for _ in range(2)]
        served.begun.wait(60)
        drained: list[bool] = []
        thread = threading.Thread(target=lambda: drained.append(served.loop.drain(60, queued=queued)))
        thread.start()
        while not refuses(served.loop):
            pass
    thread.join()
    assert drained == [True]
    assert [served.reason(number) for number in numbers] == ["length", "length" if queued else "cancelled"]
    served.loop.close()
    assert not served.loop.alive


def refuses(loop: Loop) -> bool:
    try:
        loop.cancel(loop.submit(request()))
    except ServerClosingError:
        return True
    return False


def test_drained_without_time_it_cuts_short() -> None:
    served = Served()
    with served.held:
        number = served.loop.submit(request(max_new_tokens=500))
        served.begun.wait(60)
        assert not served.loop.drain(0.0)
    assert served.reason(number) == "cancelled"
    served.loop.close()


def test_closed_it_refuses_and_ends_all() -> None:
    served = Served()
    with served.held:
        number = served.loop.submit(request(max_new_tokens=500))
        served.begun.wait(60)
        closing = threading.Thread(target=served.loop.close)
        closing.start()
    closing.join()
    assert served.reason(number) == "cancelled"
    with pytest.raises(ServerClosingError, match="takes no more requests"):
        served.loop.submit(request())
    assert not served.loop.alive
    assert served.loop.drain(60)


def test_a_failure_ends_those_it_hits_and_the_loop_goes_on(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(pieces: object) -> None:
        raise ZeroDivisionError("of our own")

    with monkeypatch.context() as patch:
        patch.setattr(served.engine, "step", fail)
        events = served.listener.wait(served.loop.submit(request()))
    assert isinstance(events[-1], Finished) and events[-1].reason == "error"
    assert "its log says more" in (events[-1].error or "") and "of our own" not in (events[-1].error or "")
    assert "of our own" in caplog.text
    assert served.reason(served.loop.submit(request())) == "length"
    assert served.loop.alive and served.loop.stats().errors == 1


def test_goes_on_when_nobody_can_hear(caplog: pytest.LogCaptureFixture) -> None:
    def hear(heard: Sequence[Heard]) -> None:
        raise OSError("gone")

    loop = Loop(tiny.engine(), tiny.tokenizer().decode, hear)
    loop.submit(request())
    loop.submit(request())
    assert loop.drain(60)
    loop.close()
    assert "events were not heard" in caplog.text


def test_steps_are_seen_by_who_listens(served: Served) -> None:
    seen: list[StepSeen] = []
    stop = served.loop.listen(seen.append)
    with served.held:
        numbers = [served.loop.submit(request(size)) for size in (2, 5)]
    for number in numbers:
        served.listener.wait(number)
    stop()
    served.listener.wait(served.loop.submit(request()))
    rows = [row for step in seen for row in step.rows]
    assert {row.number for row in rows} == set(numbers)
    for number, size in zip(numbers, (2, 5), strict=True):
        places = [
            place for row in rows if row.number == number for place in range(row.start, row.start + row.num_tokens)
        ]
        assert places == list(range(size + 2))  # the last one written is not run
    for step in seen:
        assert sum(row.num_tokens for row in step.rows) == step.num_tokens and step.seconds > 0
        assert [row.first for row in step.rows] == [
            sum(r.num_tokens for r in step.rows[:at]) for at in range(len(step.rows))
        ]


def test_figures(served: Served) -> None:
    for size in (70, 71):
        served.listener.wait(served.loop.submit(request(size, max_new_tokens=4)))
    served.loop.drain(60)
    stats = served.loop.stats()
    assert (stats.requests, stats.prompt_tokens, stats.new_tokens) == (2, 141, 8)
    assert (stats.hits, stats.hit_tokens, stats.errors, stats.preemptions) == (1, 64, 0, 0)
    assert (stats.steps, stats.tokens_run) == (8, 70 + 7 + 6)
    assert stats.cache_tokens == 65_536 == stats.held_tokens + stats.kept_tokens + stats.free_tokens
    assert (stats.held_tokens, stats.kept_tokens) == (0, 64)
    assert 0 < stats.engine_s < stats.busy_s


@pytest.mark.parametrize(
    ("name", "value"),
    [("cache_tokens", 0), ("step_tokens", 0), ("max_running", 0), ("max_queued", -1), ("verify_hits", 1.5)],
)
def test_refuses_settings(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        LoopSettings(**{name: value})  # type: ignore[arg-type]


def test_refuses_a_prompt_without_room(served: Served) -> None:
    with pytest.raises(GenerationError, match="leaves no room in a context of 512; shorten it to 511 tokens or fewer"):
        served.loop.submit(Request(prompt_ids=(5,) * 512, max_new_tokens=1))
