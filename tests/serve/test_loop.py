"""Requests through the loop: what the engine writes alone, whatever runs beside."""

from collections.abc import Iterator

import pytest

from moesaic.serve.loop import Loop
from moesaic.serve.request import Finished, Request
from tests.serve import tiny

PROMPTS = [tuple(range(3, 3 + size)) for size in (1, 7, 40, 300)]


class Served:
    def __init__(self) -> None:
        self.listener = tiny.Listener()
        self.loop = Loop(tiny.engine(), tiny.tokenizer().decode, self.listener)


@pytest.fixture
def served() -> Iterator[Served]:
    it = Served()
    yield it
    it.loop.close()


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


def test_a_cancelled_request_ends(served: Served) -> None:
    number = served.loop.submit(Request(prompt_ids=PROMPTS[0], max_new_tokens=500))
    served.loop.cancel(number)
    last = served.listener.wait(number)[-1]
    assert isinstance(last, Finished) and last.reason == "cancelled"
