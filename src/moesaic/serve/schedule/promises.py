"""Blocks that running requests are about to compute: others that need the same wait, and do not compute them too."""

from collections.abc import Sequence

from moesaic.engine.cache import BLOCK_TOKENS
from moesaic.serve.schedule.prefix_cache import Node, key_after
from moesaic.serve.schedule.waiting import Job


class Promises:
    """Who computes which block, by the hash of all tokens up to its end. Two texts with one hash: one waits in vain
    until the other has run, and nothing worse."""

    def __init__(self) -> None:
        self._makers: dict[int, Job] = {}
        self._of: dict[Job, list[int]] = {}

    def make(self, job: Job) -> None:
        """A job has begun: it will compute the full blocks that it was not given."""
        key = job.text.nodes[-1].key if job.text.nodes else 0
        keys = []
        for start in range(job.text.length, len(job.token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            key = key_after(key, tuple(job.token_ids[start : start + BLOCK_TOKENS]))
            keys.append(key)
        self._of[job] = keys
        self._makers.update(dict.fromkeys(keys, job))

    def keep(self, job: Job, nodes: Sequence[Node]) -> None:
        """These blocks are there now."""
        for node in nodes:
            self._drop(node.key, job)

    def drop(self, job: Job) -> None:
        """It will compute nothing more."""
        for key in self._of.pop(job, ()):
            self._drop(key, job)

    def maker(self, token_ids: Sequence[int], nodes: Sequence[Node]) -> Job | None:
        """Who computes the block that follows these in a text, if the text needs all of it."""
        start = BLOCK_TOKENS * len(nodes)
        if start + BLOCK_TOKENS >= len(token_ids):
            return None
        key = nodes[-1].key if nodes else 0
        return self._makers.get(key_after(key, tuple(token_ids[start : start + BLOCK_TOKENS])))

    def _drop(self, key: int, job: Job) -> None:
        if self._makers.get(key) is job:
            del self._makers[key]
