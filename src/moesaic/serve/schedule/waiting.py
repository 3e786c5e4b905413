"""Who waits: by priority, those first that had begun before, then client after client in turn."""

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from moesaic.serve.schedule.prefix_cache import SharedText

_LOOK = 64  # so many of a client's are looked at, behind those that wait for something


@dataclass(eq=False)
class Job:
    """What scheduling knows of a request.

    number: in the order of their arrival. token_ids: those that the engine is to run; they grow as it is written.
    priority: smaller goes first. shares: blocks, with other texts. scored: logits of all its tokens are wanted.
    runs: has a place in the engine. cached: tokens that it was given when it first began; None: it has not.
    """

    number: int
    token_ids: list[int]
    priority: int = 0
    client: str = ""
    shares: bool = True
    scored: bool = False
    text: SharedText = field(default_factory=SharedText)
    runs: bool = False
    cached: int | None = None
    rank: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.rank = (self.priority, self.number)

    @property
    def left(self) -> int:
        """Tokens that are yet to be run."""
        return len(self.token_ids) - self.text.length


def by_rank(job: Job) -> tuple[int, int]:
    """The more important first, then the earlier."""
    return job.rank


class Waiting:
    """Jobs that wait. Clients of one priority take turns; a client's own go in the order of their arrival.

    A client that is new goes behind all others that wait, and one that has had its turn does so too: everyone's turn
    comes, whoever else arrives.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._count = 0

    @property
    def priority(self) -> int:
        """Of the most important that waits."""
        return min(self._levels)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Job]:
        """In the order in which they would go if none were held up."""
        for priority in sorted(self._levels):
            yield from self._levels[priority].in_turn()

    def add(self, job: Job) -> None:
        """One that has not begun."""
        ring = self._level(job).ring
        ring.setdefault(job.client, deque()).append(job)
        self._count += 1

    def resume(self, job: Job) -> None:
        """One that had begun: it goes before all that have not."""
        insort(self._level(job).begun, job, key=by_rank)
        self._count += 1

    def remove(self, job: Job) -> None:
        """One that is here. Its client's turn is over if it had not begun."""
        level = self._levels[job.priority]
        if job in level.begun:
            level.begun.remove(job)
        else:
            level.ring[job.client].remove(job)
            if not level.ring[job.client]:
                del level.ring[job.client]
            else:
                level.ring.move_to_end(job.client)
        if not level.begun and not level.ring:
            del self._levels[job.priority]
        self._count -= 1

    def _level(self, job: Job) -> "_Level":
        return self._levels.setdefault(job.priority, _Level())


class _Level:
    """Those of one priority."""

    def __init__(self) -> None:
        self.begun: list[Job] = []
        self.ring: OrderedDict[str, deque[Job]] = OrderedDict()

    def in_turn(self) -> Iterator[Job]:
        yield from self.begun
        longest = max(map(len, self.ring.values()), default=0)
        for place in range(min(longest, _LOOK)):
            for jobs in self.ring.values():
                yield from islice(jobs, place, place + 1)
