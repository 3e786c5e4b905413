"""In what order a place of the pipeline works its chunks off. S stages, M micro-batches."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from moesaic.checks import require
from moesaic.registry import Registry


class Work(NamedTuple):
    """One thing that a place does: a forward chunk, a backward one, both together, or gradients of weights alone.

    forward, backward: the way of the micro-batch, 0 from the first place, 1 from the last; None: none. splits: the
    backward chunk leaves the weights' gradients for later.
    """

    forward: int | None = None
    backward: int | None = None
    splits: bool = False


WEIGHTS = Work()


class Schedule(NamedTuple):
    """order: a function from place, S and M to what a place does, in order. both_ways: micro-batches enter from both
    ends in turn, so each place holds two stages (its own, and its mirror's)."""

    order: Callable[[int, int, int], Iterator[Work]]
    both_ways: bool

    def check(self, name: str, stages: int, micro_batches: int) -> None:
        """Raise ConfigError for numbers that it is not made for."""
        require(
            not self.both_ways or (stages % 2 == 0 and micro_batches % 2 == 0 and micro_batches >= 2 * stages),
            f"schedule={name!r} with pp={stages} and micro_batches={micro_batches}; it needs an even pp and an even "
            f"number of micro-batches, {2 * stages} or more; or use schedule='1f1b'",
        )


SCHEDULES: Registry[Schedule] = Registry("schedule")


def _one_forward_one_backward(place: int, stages: int, micro_batches: int) -> Iterator[Work]:
    """As many forward chunks as stages follow, then one of each in turn (PipeDream-Flush, arXiv:2006.09503)."""
    ahead = min(stages - place - 1, micro_batches)
    yield from (Work(forward=0) for _ in range(ahead))
    for _ in range(micro_batches - ahead):
        yield Work(forward=0)
        yield Work(backward=0)
    yield from (Work(backward=0) for _ in range(ahead))


def _dualpipe(place: int, stages: int, micro_batches: int) -> Iterator[Work]:
    """The eight parts of DualPipe (DeepSeek-V3, arXiv:2412.19437, sec. 3.2.1; deepseek-ai/DualPipe, dualpipe.py)."""
    own = 0 if place < stages // 2 else 1  # seen from either end the order is the same
    other = 1 - own
    depth = min(place, stages - 1 - place)
    inner = stages // 2 - depth - 1
    yield from [Work(forward=own)] * (2 * inner)
    yield from [Work(forward=own), Work(forward=other)] * (depth + 1)
    yield from [Work(backward=other, splits=True), WEIGHTS, Work(forward=other)] * inner
    main = [Work(forward=own, backward=other), Work(forward=other, backward=own)]
    repeated = main * (micro_batches // 2 - stages + depth + 1)
    if not inner:  # in the middle the first backward chunk is that of the forward one before it
        repeated[:1] = [Work(forward=own), Work(backward=other)]
    yield from repeated
    yield from [Work(backward=other), Work(forward=other, backward=own)] * inner
    for step in range(depth + 1):
        late = step > (depth + 1) // 2
        half = step == (depth + 1) // 2
        yield Work(backward=other, splits=late or (half and depth % 2 == 1))
        yield Work(backward=own, splits=late or half)
    yield from [WEIGHTS, Work(backward=own, splits=True)] * inner
    yield from [WEIGHTS] * (depth + 1)


SCHEDULES.register("1f1b")(Schedule(_one_forward_one_backward, both_ways=False))
SCHEDULES.register("dualpipe")(Schedule(_dualpipe, both_ways=True))
