"""Serving, event by event: requests wait, are read by prefill units, move to decode units, and are written there.

A unit's step takes what the roofline says for its busiest rank (`unit.Table`). G ranks of a unit.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moesaic.checks import require
from moesaic.plan.cluster.events import Clock
from moesaic.plan.cluster.requests import ARRIVALS, Workload
from moesaic.plan.cluster.troubles import Troubles
from moesaic.plan.cluster.unit import Table, Unit

LONGEST_PASS = 4.0
"""Up to how many times the usual number of tokens a rank's pass is computed; beyond, it is drawn out in a line."""
SAMPLES = 120


@dataclass(frozen=True, kw_only=True)
class Pools:
    """`prefills` units that read prompts, `decodes` units that write. chunk: tokens that a rank reads at a time."""

    prefill: Unit
    decode: Unit
    prefills: int
    decodes: int
    chunk: int = 16384
    tokens_per_step: float = 1.0

    def __post_init__(self) -> None:
        require(self.prefills > 0 and self.decodes > 0, "a pool without a unit; give each one or more, or more devices")
        require(1 <= self.tokens_per_step <= self.decode.new, "more tokens a step than it looks at; lower one of them")

    @property
    def devices(self) -> int:
        return self.prefills * self.prefill.ranks + self.decodes * self.decode.ranks


@dataclass
class Request:
    """One text: tokens of its prompt (and of what was written before a failure), and how many are to be written."""

    came: float
    prompt: int
    output: int
    written: float = 0.0
    first_s: float = -1.0
    rank: int = 0
    joined: int = 0  # the unit's step count when it came in

    @property
    def left(self) -> float:
        return self.output - self.written

    @property
    def seen(self) -> float:
        """Tokens in its cache."""
        return self.prompt + self.written


@dataclass
class Prefill:
    """A unit that reads prompts."""

    slow: float
    epoch: int = 0
    is_up: bool = True
    batch: list[Request] = field(default_factory=list)
    busy_s: float = 0.0


class Decode:
    """A unit that writes: what each rank has, and who leaves after which step."""

    def __init__(self, ranks: int, room: int, slow: float) -> None:
        self.slow, self.room = slow, room
        self.epoch, self.steps, self.is_up, self.is_stepping = 0, 0, True, False
        self.texts_G = np.zeros(ranks, np.int64)
        self.cached_G = np.zeros(ranks)
        self.reserved_G = np.zeros(ranks)
        self.leaving: list[tuple[int, int, Request]] = []
        self.texts, self.load, self.busy_s = 0, 0, 0.0

    def admit(self, request: Request, number: int, tokens_per_step: float) -> bool:
        """Take a request in on the emptiest rank; false where it has no room. Room is kept for all it will write."""
        rank = int(self.reserved_G.argmin())
        needed = request.prompt + request.output
        if self.reserved_G[rank] + needed > self.room:
            return False
        request.rank, request.joined = rank, self.steps
        self._count(request, 1, request.seen)
        steps = max(1, int(np.ceil(request.left / tokens_per_step)))
        heapq.heappush(self.leaving, (self.steps + steps, number, request))
        return True

    def step(self, tokens_per_step: float) -> tuple[list[Request], float]:
        """End a step: who is finished, and how many tokens were written."""
        self.steps += 1
        self.cached_G += self.texts_G * tokens_per_step
        written = self.texts * tokens_per_step
        finished = []
        while self.leaving and self.leaving[0][0] <= self.steps:
            request = heapq.heappop(self.leaving)[2]
            over = (self.steps - request.joined) * tokens_per_step - request.left
            written -= over
            request.written = float(request.output)
            self._count(request, -1, request.seen + over)
            finished.append(request)
        return finished, written

    def interrupt(self, tokens_per_step: float) -> list[Request]:
        """Drop everything; the requests know how far they came."""
        dropped = [request for _, _, request in sorted(self.leaving, key=lambda each: each[:2])]
        for request in dropped:
            request.written += (self.steps - request.joined) * tokens_per_step
        self.texts_G[:], self.cached_G[:], self.reserved_G[:] = 0, 0, 0
        self.texts, self.load = 0, 0
        self.leaving.clear()
        return dropped

    def _count(self, request: Request, sign: int, cached: float) -> None:
        needed = sign * (request.prompt + request.output)
        self.texts += sign
        self.load += needed
        self.texts_G[request.rank] += sign
        self.cached_G[request.rank] += sign * cached
        self.reserved_G[request.rank] += needed


class Sample(NamedTuple):
    """A moment: when, how many requests wait to be read and to be written, how many are being written."""

    at: float
    to_read: int
    to_write: int
    writing: int


@dataclass
class Ledger:
    """What came and went: requests, tokens, bytes of states. written_before: what warm texts had when it began."""

    warm: int = 0
    came: int = 0
    finished: int = 0
    finished_tokens: int = 0
    failures: int = 0
    read_tokens: int = 0
    cached_tokens: int = 0
    written: float = 0.0
    written_before: float = 0.0
    bytes_sent: float = 0.0
    bytes_received: float = 0.0
    bytes_lost: float = 0.0
    first_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    step_texts: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    written_at: list[float] = field(default_factory=list)


class Serving:
    """A simulation that can be looked into. Run it once."""

    def __init__(self, pools: Pools, workload: Workload, troubles: Troubles, *, seconds: float, seed: int = 0) -> None:
        require(seconds > 0, f"{seconds} seconds to simulate; give more than 0")
        self.pools, self.workload, self.troubles, self.seconds = pools, workload, troubles, seconds
        self.random = np.random.default_rng(seed)
        self.clock, self.ledger = Clock(), Ledger()
        self.to_read: deque[Request] = deque()
        self.to_write: deque[Request] = deque()
        self.num_moving = 0
        room = pools.decode.cache_tokens
        slow = [troubles.slow(self.random, pools.prefill.ranks) for _ in range(pools.prefills)]
        self.prefills = [Prefill(each) for each in slow]
        ranks = pools.decode.ranks
        self.decodes = [Decode(ranks, room, troubles.slow(self.random, ranks)) for _ in range(pools.decodes)]
        longest = 2.0 * (workload.prompt + workload.output)
        self.reading = Table(pools.prefill, "prefill", LONGEST_PASS * pools.chunk, longest)
        most = max(16.0, min(2048.0, room / max(1.0, workload.prompt)))
        self.writing = Table(pools.decode, "decode", most, longest)
        self.state_bytes = pools.decode.state_bytes
        self._numbers = 0

    def run(self) -> "Serving":
        """Simulate to the end."""
        self._plan_arrivals()
        self._warm_up()
        for index in range(len(self.prefills)):
            self._plan_failure("prefill", index, self.pools.prefill.ranks)
        for index in range(len(self.decodes)):
            self._plan_failure("decode", index, self.pools.decode.ranks)
        self.clock.plan(0.0, "sample")
        while event := self.clock.next(self.seconds):
            getattr(self, f"_on_{event.kind}")(event.about)
        return self

    def _plan_arrivals(self) -> None:
        work = self.workload
        moments = ARRIVALS[work.arrivals](self.random, work.rate, self.seconds)
        prompts = work.lengths(self.random, work.prompt, len(moments))
        outputs = work.lengths(self.random, work.output, len(moments))
        for moment, prompt, output in zip(moments.tolist(), prompts.tolist(), outputs.tolist(), strict=True):
            self.clock.plan(moment, "arrival", Request(moment, prompt, output))

    def _warm_up(self) -> None:
        """Texts that are half written already: as many as come while one is written (Little's law)."""
        work, pools = self.workload, self.pools
        steps = work.output / pools.tokens_per_step
        share = work.rate / (len(self.decodes) * pools.decode.ranks)
        texts = 1.0
        for _ in range(30):  # the more texts, the longer their steps: a fixed point, or the most that there is room for
            longer = self.writing.seconds(texts, work.prompt + work.output / 2, texts * pools.decode.new)
            texts = min(share * steps * longer, pools.decode.cache_tokens / (work.prompt + work.output))
        count = int(texts * len(self.decodes) * pools.decode.ranks)
        prompts = work.lengths(self.random, work.prompt, count)
        outputs = work.lengths(self.random, work.output, count)
        for index, (prompt, output) in enumerate(zip(prompts.tolist(), outputs.tolist(), strict=True)):
            request = Request(0.0, prompt, output, written=float(self.random.integers(output)), first_s=0.0)
            if self.decodes[index % len(self.decodes)].admit(request, self._number(), pools.tokens_per_step):
                self.ledger.warm += 1
                self.ledger.written_before += request.written
        for index in range(len(self.decodes)):
            self._start_step(index)

    def _on_arrival(self, request: Request) -> None:
        self.ledger.came += 1
        self._enqueue([request])

    def _enqueue(self, requests: list[Request]) -> None:
        self.to_read.extend(requests)
        for index, unit in enumerate(self.prefills):
            if unit.is_up and not unit.batch and self.to_read:
                self._start_reading(index)

    def _start_reading(self, index: int) -> None:
        """The oldest prompts, as many as a full pass takes, each on the rank with the fewest tokens so far."""
        unit, ranks = self.prefills[index], self.pools.prefill.ranks
        room, total, context = self.pools.chunk * ranks, 0, 0.0
        filled = [0] * ranks
        while self.to_read and (not unit.batch or total + self._new_tokens(self.to_read[0]) <= room):
            request = self.to_read.popleft()
            tokens = self._new_tokens(request)
            heapq.heapreplace(filled, filled[0] + tokens)
            total, context = total + tokens, context + tokens * request.seen
            unit.batch.append(request)
        seconds = self.reading.seconds(max(filled), context / total, total / ranks, unit.slow)
        unit.busy_s += seconds
        self.clock.plan(seconds, "read", (index, unit.epoch))

    def _new_tokens(self, request: Request) -> int:
        return max(1, round(request.seen * (1 - self.workload.cached)))

    def _on_read(self, about: tuple[int, int]) -> None:
        unit = self.prefills[about[0]]
        if about[1] != unit.epoch:
            return
        batch, unit.batch = unit.batch, []
        network = self.pools.prefill.device.network or self.pools.prefill.device.link
        rate = network * self.pools.prefill.device.efficiency.network
        for request in batch:
            if request.first_s < 0:
                request.first_s = self.clock.now - request.came
                self.ledger.first_s.append(request.first_s)
            new = self._new_tokens(request)
            self.ledger.read_tokens += new
            self.ledger.cached_tokens += round(request.seen) - new
            size = request.seen * self.state_bytes
            self.ledger.bytes_sent += size
            self.num_moving += 1
            self.clock.plan(size / rate, "moved", (request, size))
        if self.to_read:
            self._start_reading(about[0])

    def _on_moved(self, about: tuple[Request, float]) -> None:
        request, size = about
        self.ledger.bytes_received += size
        self.num_moving -= 1
        self.to_write.append(request)
        for index, unit in enumerate(self.decodes):
            if unit.is_up and not unit.is_stepping:
                self._start_step(index)

    def _start_step(self, index: int) -> None:
        """Let waiting texts in, as long as it is not much fuller than others, and start the next step of all."""
        unit, pools = self.decodes[index], self.pools
        emptiest = min(each.load for each in self.decodes if each.is_up)
        while self.to_write and unit.load <= emptiest + self._slack:
            if not unit.admit(self.to_write[0], self._number(), pools.tokens_per_step):
                break
            self.to_write.popleft()
        total = unit.texts
        unit.is_stepping = total > 0
        if not total:
            return
        busiest = int(unit.cached_G.argmax())
        context = float(unit.cached_G[busiest]) / max(1, int(unit.texts_G[busiest]))
        tokens = total * pools.decode.new / pools.decode.ranks
        seconds = self.writing.seconds(float(unit.texts_G[busiest]), context, tokens, unit.slow)
        unit.busy_s += seconds
        self.ledger.step_s.append(seconds)
        self.ledger.step_texts.append(total)
        self.clock.plan(seconds, "step", (index, unit.epoch))

    @property
    def _slack(self) -> float:
        """Tokens by which a unit may be fuller than the emptiest and still take texts."""
        return 0.05 * self.decodes[0].room * self.pools.decode.ranks

    def _on_step(self, about: tuple[int, int]) -> None:
        unit = self.decodes[about[0]]
        if about[1] != unit.epoch:
            return
        finished, written = unit.step(self.pools.tokens_per_step)
        self.ledger.finished += len(finished)
        self.ledger.finished_tokens += sum(request.output for request in finished)
        self.ledger.written += written
        self._start_step(about[0])

    def _plan_failure(self, pool: str, index: int, ranks: int) -> None:
        after = self.troubles.until_failure(self.random, ranks)
        if after < self.seconds:
            self.clock.plan(after, "failure", (pool, index))

    def _on_failure(self, about: tuple[str, int]) -> None:
        pool, index = about
        unit = self.prefills[index] if pool == "prefill" else self.decodes[index]
        unit.epoch, unit.is_up = unit.epoch + 1, False
        self.ledger.failures += 1
        if isinstance(unit, Prefill):
            dropped, unit.batch = unit.batch, []
        else:
            dropped, unit.is_stepping = unit.interrupt(self.pools.tokens_per_step), False
            self.ledger.bytes_lost += sum(request.seen for request in dropped) * self.state_bytes
        self.clock.plan(self.troubles.repair_s, "repair", about)
        self._enqueue(dropped)

    def _on_repair(self, about: tuple[str, int]) -> None:
        pool, index = about
        if pool == "prefill":
            self.prefills[index].is_up = True
            self._plan_failure(pool, index, self.pools.prefill.ranks)
            self._enqueue([])
        else:
            self.decodes[index].is_up = True
            self._plan_failure(pool, index, self.pools.decode.ranks)
            self._start_step(index)

    def _on_sample(self, _: None) -> None:
        writing = sum(unit.texts for unit in self.decodes)
        self.ledger.samples.append(Sample(self.clock.now, len(self.to_read), len(self.to_write), writing))
        self.ledger.written_at.append(self.ledger.written)
        self.clock.plan(self.seconds / SAMPLES, "sample")

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers
