"""An engine that is not there: a scheduler's steps are run, and what tokens see in their text's blocks is checked."""

from itertools import accumulate
from typing import NamedTuple

from moesaic.engine.builder import CacheShape
from moesaic.engine.cache import BLOCK_TOKENS, BlockCache
from moesaic.serve.schedule.prefix_cache import PrefixCache
from moesaic.serve.schedule.scheduler import Scheduler, Share
from moesaic.serve.schedule.waiting import Job


def history(token_ids: list[int]) -> list[int]:
    """What stands for the bits of each token: it depends on all tokens up to it."""
    return list(accumulate(token_ids, lambda before, token: hash((before, token)), initial=0))[1:]


class Wish(NamedTuple):
    """A request: its prompt, the tokens that it wants, and before which step it comes."""

    prompt: tuple[int, ...]
    num_new: int
    step: int = 0
    priority: int = 0
    client: str = ""
    shares: bool = True


class Simulation:
    """Runs wishes to their end.

    ended: jobs in the order of their end. computed: tokens that were run for each.
    """

    def __init__(self, *, num_blocks: int, step_tokens: int = 64, max_running: int = 4) -> None:
        self.cache = BlockCache([CacheShape(1, 8, 8, False)], format="bf16", max_blocks=num_blocks)
        self.prefixes = PrefixCache(self.cache)
        self.scheduler = Scheduler(
            self.prefixes, step_tokens=step_tokens, max_running=max_running, scored_tokens=step_tokens
        )
        self.content: dict[int, list[int | None]] = {}
        self.goals: dict[Job, int] = {}
        self.ended: list[Job] = []
        self.computed: dict[Job, int] = {}
        self._count = 0

    def add(self, wish: Wish) -> Job:
        self._count += 1
        job = Job(self._count, list(wish.prompt), wish.priority, wish.client, wish.shares)
        self.goals[job] = len(wish.prompt) + wish.num_new
        self.computed[job] = 0
        self.scheduler.add(job)
        return job

    def step(self) -> list[Share]:
        """Plan, run, and settle."""
        shares = self.scheduler.plan()
        assert sum(share.num_tokens for share in shares) <= self.scheduler.step_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_running
        self._check_blocks()
        spare = self.scheduler.spare_blocks
        for job, num_tokens in shares:
            assert job.runs and 0 < num_tokens <= job.left
            self._run(job, num_tokens)
        assert self.prefixes.num_available == spare >= 0, (
            "the step takes the blocks that were planned, no more, no less"
        )
        for job, _ in shares:
            self._settle(job)
        assert self.cache.num_blocks <= (self.cache.max_blocks or 0)
        return shares

    def _check_blocks(self) -> None:
        """Every block is held by a text that runs, or can be given to one."""
        held = [block for job in self.scheduler.running for block in job.text.blocks]
        assert len(set(held)) + self.prefixes.num_available == self.cache.max_blocks
        assert all(self.cache.holders(block) >= held.count(block) for block in set(held))

    def _run(self, job: Job, num_tokens: int) -> None:
        text = job.text
        self.cache.make_room(text, text.length + num_tokens)
        bits = history(job.token_ids)
        for place in range(text.length, text.length + num_tokens):
            block = self.content.setdefault(text.blocks[place // BLOCK_TOKENS], [None] * BLOCK_TOKENS)
            block[place % BLOCK_TOKENS] = bits[place]
        text.length += num_tokens
        self.computed[job] += num_tokens
        seen = [bit for block in text.blocks for bit in self.content[block]][: text.length]
        assert seen == bits[: text.length]

    def _settle(self, job: Job) -> None:
        if not job.left:
            job.token_ids.append(job.number * 1000 + len(job.token_ids))
        self.scheduler.ran(job)
        if len(job.token_ids) >= self.goals[job]:
            self.scheduler.end(job)
            self.ended.append(job)

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or len(self.scheduler.waiting))

    def run(self, wishes: list[Wish], most_steps: int = 10_000) -> list[Job]:
        """All of them, each from its step on; raises where they do not end in so many steps."""
        jobs: list[Job | None] = [None] * len(wishes)
        for now in range(most_steps):
            for place, wish in enumerate(wishes):
                if wish.step == now:
                    jobs[place] = self.add(wish)
            if self.busy:
                assert self.step(), "nothing runs, and something waits"
            elif None not in jobs:
                return [job for job in jobs if job is not None]
        raise AssertionError(f"not at an end after {most_steps} steps")
