"""Runs requests on a desk under the server's limits, and counts what comes of each."""

import dataclasses
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from moesaic.errors import GenerationError, MoesaicError
from moesaic.serve.http.errors import ApiError
from moesaic.serve.operation.metrics import Metrics
from moesaic.serve.operation.notes import Notes, current
from moesaic.serve.operation.refusals import retry_after
from moesaic.serve.operation.settings import Limits
from moesaic.serve.request import Event, Finished, Progress, Request
from moesaic.serve.seen import Stats
from moesaic.serve.served import Runs

_WEIGHT = 0.1  # of the newest request in the mean of their durations
_FIRST_GUESS_S = 5.0
_LONGEST_WAIT_S = 120.0


class Pace:
    """How long requests take lately, and so how long one more would wait. together: how many run at once."""

    def __init__(self, together: int) -> None:
        self.together = together
        self._mean_s = _FIRST_GUESS_S

    def add(self, seconds: float) -> None:
        """One took so long."""
        self._mean_s += _WEIGHT * (seconds - self._mean_s)

    def wait_s(self, waiting: int) -> float:
        """Seconds until there is a place, behind so many others."""
        return min(_LONGEST_WAIT_S, (waiting + 1) * self._mean_s / self.together)


class CountedRuns:
    """A desk that takes no more requests than may run and wait together, none of more than the limits allow.

    Raises ApiError (429, with Retry-After) for one more, GenerationError for one that is too long. decode: given where
    logs are to have texts. After `end` requests end with what they have.
    """

    def __init__(
        self,
        model: str,
        desk: Runs,
        *,
        limits: Limits,
        together: int,
        metrics: Metrics,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self.model, self.desk, self.limits, self.metrics, self._decode = model, desk, limits, metrics, decode
        self.inside = 0
        self._pace = Pace(together)
        self._ending = False

    async def run(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of a request."""
        self._check(request)
        counts = _Counts(self.model, request, self.metrics, current.get(), self._decode)
        limited = dataclasses.replace(request, timeout_s=min(request.timeout_s or math.inf, self.limits.timeout_s))
        self.inside += 1
        refused = False
        try:
            async with aclosing(self.desk.run(limited)) as events:
                async for event in events:
                    if self._ending and isinstance(event, Finished) and event.reason == "cancelled":
                        event = event._replace(reason="timeout")
                    counts.hear(event)
                    yield event
        except MoesaicError:  # the desk does not take it
            refused = True
            raise
        finally:
            self.inside -= 1
            if not refused:
                self._pace.add(counts.over())

    def stats(self) -> Stats:
        """How the loop stands."""
        return self.desk.stats()

    async def end(self) -> None:
        """End all requests, with what they have."""
        self._ending = True
        await self.desk.close()

    async def close(self) -> None:
        """End all requests."""
        if not self._ending:
            await self.desk.close()

    def _check(self, request: Request) -> None:
        limits, together = self.limits, self._pace.together
        if self.inside >= together + limits.queue:
            wait_s = self._pace.wait_s(self.inside - together)
            message = f"{self.inside} requests run or wait, as many as may; ask again in {wait_s:.0f} s"
            raise ApiError(429, message, headers=retry_after(wait_s))
        size, most = len(request.prompt_ids), limits.prompt_tokens
        if most is not None and size > most:
            raise GenerationError(f"a prompt of {size} tokens; this server allows {most}, send fewer")


class _Counts:
    """What is counted of one continuation."""

    def __init__(
        self,
        model: str,
        request: Request,
        metrics: Metrics,
        notes: Notes | None,
        decode: Callable[[Sequence[int]], str] | None,
    ) -> None:
        self.model, self.metrics, self.notes, self._keeps_text = model, metrics, notes, decode is not None
        self._between = metrics.between_tokens(model)
        self.started = time.perf_counter()
        self._newest: float | None = None
        self._num_prompt, self._num_new, self._num_cached, self._reason = len(request.prompt_ids), 0, 0, "cancelled"
        if notes is not None:
            notes.model = model
            if decode is not None:
                notes.prompts.append(decode(request.prompt_ids))
                notes.texts.append("")
                self._text_at = len(notes.texts) - 1

    def hear(self, event: Event) -> None:
        """Count an event as it goes by."""
        if isinstance(event, Progress):
            self._progress(event)
        elif isinstance(event, Finished):
            self._reason, self._num_cached = event.reason, event.usage.cached_tokens

    def over(self) -> float:
        """Count the whole; its seconds."""
        seconds = time.perf_counter() - self.started
        self.metrics.finished(
            self.model,
            self._reason,
            seconds,
            prompt_tokens=self._num_prompt,
            cached_tokens=self._num_cached,
            new_tokens=self._num_new,
        )
        if self.notes is not None:
            self.notes.prompt_tokens += self._num_prompt
            self.notes.cached_tokens += self._num_cached
            self.notes.completion_tokens += self._num_new
            self.notes.finish = self._reason
        return seconds

    def _progress(self, event: Progress) -> None:
        now, count = time.perf_counter(), len(event.tokens)
        if not count:
            return
        if self._newest is None:
            self.metrics.first_token(self.model, now - self.started)
            if self.notes is not None and self.notes.first_token_at is None:
                self.notes.first_token_at = now
        else:
            self._between(now - self._newest)
        for _ in range(count - 1):  # which clients get at once
            self._between(0.0)
        self._newest = now
        self._num_new += count
        if self.notes is not None and self._keeps_text:
            self.notes.texts[self._text_at] += event.text
