"""The loop: a thread that takes requests, runs the engine step by step, and tells what came of each."""

import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from moesaic.engine.cache import BLOCK_TOKENS
from moesaic.engine.engine import Engine
from moesaic.errors import QueueFullError, ServerClosingError
from moesaic.serve.choice.guidance import Guidance
from moesaic.serve.choice.writing import Writing
from moesaic.serve.loop.runner import Runner
from moesaic.serve.loop.settings import LoopSettings
from moesaic.serve.request import Finished, Heard, Request
from moesaic.serve.seen import Stats, StepSeen
from moesaic.serve.speculation.drafter import Drafter

_log = logging.getLogger(__name__)


class Loop:
    """Runs requests through an engine, many together. Thread-safe but for what its own thread does.

    hear: told, in the loop's thread, everything that came of a step at once. decode: token ids to text.
    drafter: guesses how texts go on, for requests that may `speculate`. guidance: for those with a grammar; closed with
    the loop.

    A request gets the same tokens alone, beside any others, with blocks that others have computed, after it had to
    give way to others, and with drafts.
    """

    def __init__(
        self,
        engine: Engine,
        decode: Callable[[list[int]], str],
        hear: Callable[[Sequence[Heard]], None],
        *,
        settings: LoopSettings | None = None,
        drafter: Drafter | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        self.engine, self.hear, self.settings = engine, hear, settings or LoopSettings()
        self._runner = Runner(engine, decode, self.settings, drafter, guidance)
        self._numbers = itertools.count(1)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._changed = threading.Condition()  # of the two that follow
        self._open: set[int] = set()
        self._closing = False
        self._stopped = False
        self._deadlines: list[tuple[float, int]] = []
        self._busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="engine loop", daemon=True)
        self._thread.start()

    @property
    def max_length(self) -> int:
        """The most tokens of a text."""
        return self._runner.max_length

    @property
    def alive(self) -> bool:
        """Whether the thread runs. Where it does not, all requests have ended."""
        return self._thread.is_alive()

    def prepare(self, request: Request) -> None:
        """Have a request's grammar compiled, which may take seconds, so that `submit` finds it.

        Raises GenerationError as `submit` does.
        """
        self._runner.writing(request)

    def submit(self, request: Request) -> int:
        """Take a request; its number.

        Raises GenerationError for one that this engine cannot run, QueueFullError where as many wait as may,
        ServerClosingError after `drain` or `close`.
        """
        writing = self._runner.writing(request)
        most = self.settings.max_queued
        with self._changed:
            if self._closing:
                raise ServerClosingError("this server takes no more requests; ask another, or come again later")
            if most is not None and len(self._open) >= self.settings.max_running + most:
                raise QueueFullError(f"{most} requests wait already, and no more may; come again later")
            number = next(self._numbers)  # and into the inbox in this order
            self._open.add(number)
            self._inbox.put(partial(self._add, number, writing, time.monotonic()))
        return number

    def cancel(self, number: int) -> None:
        """End a request as it stands; it hears so. One that has ended already hears nothing."""
        self._inbox.put(partial(self._runner.end, number, "cancelled"))

    def drain(self, timeout_s: float | None = None, *, queued: bool = True) -> bool:
        """Take nothing new, and wait until all requests have ended; after `timeout_s` the rest are cancelled.

        queued: False: those that have not begun are cancelled at once. Whether none had to be cut short by time.
        """
        with self._changed:
            self._closing = True
        if not queued:
            self._inbox.put(self._runner.end_waiting)
        with self._changed:
            ended = self._changed.wait_for(lambda: not self._open, timeout_s)
            rest = list(self._open)
        for number in rest:
            self.cancel(number)
        return ended

    def close(self) -> None:
        """End all requests, and the thread."""
        with self._changed:
            self._closing = True
        self._inbox.put(self._stop)
        self._thread.join()
        if self._runner.guidance is not None:
            self._runner.guidance.close()

    def listen(self, listener: Callable[[StepSeen], None]) -> Callable[[], None]:
        """Have a function told of every step, in the loop's thread; what is returned ends that."""
        return self._runner.stepping.listen(listener)

    def stats(self) -> Stats:
        """How it stands; from any thread, and cheap."""
        runner, counts = self._runner, self._runner.counts
        scheduler, stepping, cache = runner.scheduler, runner.stepping, self.engine.cache
        prefixes, num_running = scheduler.prefixes, scheduler.num_running
        free, available = cache.num_free, prefixes.num_available
        return Stats(
            queued=max(0, len(self._open) - num_running),
            running=num_running,
            cache_tokens=cache.num_blocks * BLOCK_TOKENS,
            held_tokens=(cache.num_blocks - available) * BLOCK_TOKENS,
            kept_tokens=(available - free) * BLOCK_TOKENS,
            free_tokens=free * BLOCK_TOKENS,
            requests=counts["requests"],
            hits=scheduler.hits,
            hit_tokens=scheduler.hit_tokens,
            verified=counts["verified"],
            mismatches=counts["mismatches"],
            evictions=prefixes.evictions,
            preemptions=scheduler.preemptions,
            errors=counts["error"],
            steps=stepping.steps,
            tokens_run=stepping.tokens_run,
            prompt_tokens=counts["prompt_tokens"],
            new_tokens=counts["new_tokens"],
            drafted=counts["drafted"],
            accepted=counts["accepted"],
            engine_s=stepping.engine_s,
            busy_s=self._busy_s,
        )

    def _add(self, number: int, writing: Writing, since: float) -> None:
        timeout_s = writing.request.timeout_s
        if timeout_s is not None:
            heapq.heappush(self._deadlines, (since + timeout_s, number))
        self._runner.add(number, writing)

    def _stop(self) -> None:
        self._stopped = True

    def _run(self) -> None:
        try:
            while self._take():
                if self._runner.busy:
                    self._timed(lambda: self._guard(self._runner.step))
                self._timed(self._tell)
        finally:
            self._end()

    def _take(self) -> bool:
        """What has come in; waits for something when there is nothing to do. False: to be closed."""
        while not self._stopped and not (self._runner.busy and self._inbox.empty()):
            self._guard(self._inbox.get())
            if not self._runner.busy:
                self._tell()
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            self._runner.end(heapq.heappop(self._deadlines)[1], "timeout")
        return not self._stopped

    def _timed(self, do: Callable[[], None]) -> None:
        began = time.perf_counter()
        do()
        self._busy_s += time.perf_counter() - began

    def _guard(self, do: Callable[[], None]) -> None:
        """What fails for no reason that is known ends all requests, as it may have left any of them half done."""
        try:
            do()
        except Exception:
            _log.exception("the loop failed; all requests end")
            self._runner.end_all("error", "the server failed at something that this request was in; its log says more")

    def _tell(self) -> None:
        heard = self._runner.take_heard()
        if not heard:
            return
        try:
            self.hear(heard)
        except Exception:
            _log.exception("%d events were not heard", len(heard))
        ended = [number for number, event in heard if isinstance(event, Finished)]
        if ended:
            with self._changed:
                self._open.difference_update(ended)
                self._changed.notify_all()

    def _end(self) -> None:
        """Nothing more is run, and nobody waits for it."""
        with self._changed:
            self._closing = True
        try:
            while not self._inbox.empty():
                self._guard(self._inbox.get())
            self._runner.end_all("cancelled")
            self._tell()
        finally:
            with self._changed:
                self._open.clear()
                self._changed.notify_all()
