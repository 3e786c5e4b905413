"""Requests from asyncio."""

import asyncio

from moesaic.serve.loop.desk import Desk
from moesaic.serve.request import Event, Request
from tests.serve import tiny


def test_requests_run_beside_each_other() -> None:
    async def ask(desk: Desk, size: int) -> list[Event]:
        return [event async for event in desk.run(Request(prompt_ids=tuple(range(1, 1 + size)), max_new_tokens=9))]

    async def ask_all() -> list[list[Event]]:
        desk = Desk(tiny.engine(), tiny.tokenizer().decode)
        try:
            return await asyncio.gather(*(ask(desk, size) for size in (1, 5, 33)))
        finally:
            await desk.close()

    found = [tiny.new_ids(events) for events in asyncio.run(ask_all())]
    assert found == [tiny.engine().generate(range(1, 1 + size), 9) for size in (1, 5, 33)]
