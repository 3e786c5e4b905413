"""What runs in a step: whose tokens, how many, and who gives up its place in the cache for another.

Newest tokens go first, of everybody; then prompts, the more important and the earlier first, in as large pieces as the
step has room for. Nothing here knows the engine: how a text is cut into pieces changes no bit of what comes of it.
"""

from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

from moesaic.engine.cache import BLOCK_TOKENS
from moesaic.errors import ConfigError
from moesaic.serve.schedule.prefix_cache import Node, PrefixCache, num_blocks
from moesaic.serve.schedule.promises import Promises
from moesaic.serve.schedule.waiting import Job, Waiting, by_rank


class Share(NamedTuple):
    """What a step runs of a job: its next tokens."""

    job: Job
    num_tokens: int


class Scheduler:
    """Who waits, who runs, and what a step runs of them.

    step_tokens: the most tokens of a step. max_running: requests in the engine at a time. scored_tokens: the most
    tokens of a step whose logits are all wanted.

    The most important of those that run, and of these the earliest, goes on in every step: all others give way to it
    when the cache is full. So each ends, whatever the others are, as long as it fits in the cache alone.
    begun: how many jobs have been given a place; hits: how many of these shared blocks, hit_tokens of them.
    """

    def __init__(
        self, prefixes: PrefixCache, *, step_tokens: int = 256, max_running: int = 64, scored_tokens: int = 64
    ) -> None:
        if max_running < 1 or step_tokens < max_running:
            raise ConfigError(
                f"steps of {step_tokens} tokens for {max_running} requests at a time; each needs one in every step"
            )
        self.prefixes, self.step_tokens = prefixes, step_tokens
        self.max_running, self.scored_tokens = max_running, scored_tokens
        self.running: list[Job] = []  # by rank
        self.waiting = Waiting()
        self.begun = self.hits = self.hit_tokens = self.preemptions = 0
        self._promises = Promises()
        self._shares: dict[Job, int] = {}
        self._planned = 0  # blocks that what is in _shares will take

    @property
    def num_running(self) -> int:
        """Requests that have a place, from any thread."""
        return sum(job.number > 0 for job in list(self.running))

    def add(self, job: Job) -> None:
        """Take a job that fits in the cache when it is alone."""
        self.waiting.add(job)

    def end(self, job: Job) -> None:
        """Forget a job, wherever it is; its blocks serve others."""
        if job.runs:
            self._stop(job)
        else:
            self.waiting.remove(job)

    def ran(self, job: Job) -> None:
        """A step has run tokens of a job, and these are settled: they may be shared now."""
        text = job.text
        if job.shares and text.length >= BLOCK_TOKENS * (len(text.nodes) + 1):
            before = len(text.nodes)
            self.prefixes.publish(text, job.token_ids)
            self._promises.keep(job, text.nodes[before:])

    def plan(self) -> list[Share]:
        """The next step. All it names must then be run; who loses its place for it has been stopped already."""
        self._shares, self._planned = {}, 0
        for job in [job for job in self.running if job.left == 1]:
            if job.runs and self._find_room(job, 1):
                self._shares[job] = 1
        self._admit()
        self._share_prompts()
        return [Share(job, count) for job, count in self._shares.items()]

    @property
    def spare_tokens(self) -> int:
        """That the planned step has yet room for."""
        return self.step_tokens - sum(self._shares.values())

    @property
    def spare_blocks(self) -> int:
        """That the planned step leaves to others."""
        return self.prefixes.num_available - self._planned

    def add_drafts(self, job: Job, count: int) -> bool:
        """Plan so many tokens more for a job, if that takes nobody's place. Whether it does not."""
        planned = self._shares[job]
        needed = _missing(job, planned + count) - _missing(job, planned)
        if count > self.spare_tokens or needed > self.spare_blocks:
            return False
        self._planned += needed
        self._shares[job] += count
        return True

    def _share_prompts(self) -> None:
        scored = self.scored_tokens
        for job in list(self.running):
            if job not in self._shares and job.runs and self.spare_tokens:
                most = min(self.spare_tokens, scored) if job.scored else self.spare_tokens
                count = self._fitting(job, min(job.left, most))
                scored -= count if job.scored else 0
                if count:
                    self._shares[job] = count

    def _fitting(self, job: Job, count: int) -> int:
        """How many of these tokens have room, once all others that must have given way."""
        if count <= 0 or self._find_room(job, count):
            return max(count, 0)
        blocks = len(job.text.blocks) + self.spare_blocks
        count = min(count, blocks * BLOCK_TOKENS - job.text.length)
        return count if count > 0 and self._find_room(job, count) else 0

    def _find_room(self, job: Job, count: int) -> bool:
        """Plan blocks for tokens of a job. The last ones of those that run give way to it while it lacks them."""
        needed = _missing(job, count)
        while self.spare_blocks < needed:
            last = self.running[-1]
            if last.rank <= job.rank:
                return False
            self._preempt(last)
        self._planned += needed
        return True

    def _admit(self) -> None:
        """Give those that wait a place, as long as the step has room for their tokens."""
        while self.waiting and self._has_turn(self.waiting.priority):
            found = self._next()
            if found is None or not self._make_way(*found):
                return
            self._begin(*found)

    def _has_turn(self, priority: int) -> bool:
        """Whether one of this priority could begin, and would have tokens in this step."""
        if len(self.running) >= self.max_running and self.running[-1].priority <= priority:
            return False
        return sum(each.left for each in self.running if each.priority <= priority) < self.step_tokens

    def _next(self) -> tuple[Job, list[Node]] | None:
        """Whose turn it is, with the blocks that it will share. It waits for a block that one as important computes."""
        for job in self.waiting:
            if not job.shares:
                return job, []
            nodes = self.prefixes.match(job.token_ids)
            maker = self._promises.maker(job.token_ids, nodes)
            if maker is None or maker.priority > job.priority:
                return job, nodes
        return None

    def _make_way(self, job: Job, nodes: Sequence[Node]) -> bool:
        """Whether a job may begin; less important ones give way to it."""
        while self.running and (len(self.running) >= self.max_running or not self._has_room(job, nodes)):
            last = self.running[-1]
            if last.priority <= job.priority:
                return False
            self._preempt(last)
        return True

    def _has_room(self, job: Job, nodes: Sequence[Node]) -> bool:
        """For all its tokens, beside all of those that run and a further block of each."""
        needed = num_blocks(len(job.token_ids)) - len(nodes) + self.prefixes.num_idle(nodes)
        promised = sum(1 + _missing(each, each.left) for each in self.running)
        return self.prefixes.num_available - promised >= needed

    def _begin(self, job: Job, nodes: Sequence[Node]) -> None:
        self.waiting.remove(job)
        insort(self.running, job, key=by_rank)
        job.runs = True
        self.prefixes.take(job.text, nodes)
        if job.cached is None:
            job.cached = job.text.length
            self.begun += 1
            self.hits += bool(nodes)
            self.hit_tokens += job.cached
        if job.shares:
            self._promises.make(job)

    def _preempt(self, job: Job) -> None:
        count = self._shares.pop(job, 0)
        self._planned -= _missing(job, count)
        self.preemptions += 1
        self._stop(job)
        self.waiting.resume(job)

    def _stop(self, job: Job) -> None:
        self.running.remove(job)
        job.runs = False
        self._promises.drop(job)
        self.prefixes.release(job.text)


def _missing(job: Job, count: int) -> int:
    """Blocks that the next `count` tokens of a job need beyond those that it has."""
    return max(0, num_blocks(job.text.length + count) - len(job.text.blocks))
