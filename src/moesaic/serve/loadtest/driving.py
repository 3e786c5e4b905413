"""Drives a workload against a server: at random times, or by clients that wait for their answers."""

import asyncio
import time
from collections.abc import Callable, Iterator

from moesaic.serve.loadtest.asking import Asked, Server
from moesaic.serve.loadtest.workload import Planned, Workload, planned

_LONGEST_PAUSE_S = 1.0


class Progress:
    """How far a test is: what has ended, and how many requests run."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.done: list[Asked] = []
        self.running = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


async def drive(
    server: Server, workload: Workload, progress: Progress, hear: Callable[[Asked], None] = lambda _: None
) -> list[Asked]:
    """Send everything, and wait for all answers; those that have ended are in `progress` as they end."""
    requests = planned(workload, await server.measure_words())
    progress.started = time.perf_counter()

    async def ask(request: Planned) -> Asked:
        progress.running += 1
        try:
            asked = await server.ask(request, progress.started)
        finally:
            progress.running -= 1
        progress.done.append(asked)
        hear(asked)
        return asked

    if workload.rate is not None:
        await _at_random(requests, workload, progress, ask)
    else:
        await asyncio.gather(*(_one_by_one(requests, workload, progress, ask) for _ in range(workload.concurrency)))
    return progress.done


async def _at_random(requests: Iterator[Planned], workload: Workload, progress: Progress, ask: Callable) -> None:
    async with asyncio.TaskGroup() as sent:
        for request in requests:
            assert request.at_s is not None
            if workload.seconds is not None and request.at_s > workload.seconds:
                return
            await asyncio.sleep(request.at_s - progress.seconds)
            sent.create_task(ask(request))


async def _one_by_one(requests: Iterator[Planned], workload: Workload, progress: Progress, ask: Callable) -> None:
    for request in requests:
        if workload.seconds is not None and progress.seconds > workload.seconds:
            return
        asked = await ask(request)
        if asked.error not in (None, "left"):  # a client that was refused does not hammer on the door
            await asyncio.sleep(min(_LONGEST_PAUSE_S, asked.retry_after_s or 0.1))
