"""The processes that share a training step, as little as a step needs to know of them."""

from typing import Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from moesaic.errors import ConfigError

Item = TypeVar("Item")


class Ranks(Protocol):
    """P processes, each with its own part of the data. All of them make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """Which of them this one is, from 0."""
        ...

    @property
    def size(self) -> int:
        """P."""
        ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over ranks, in place; every rank gets the same bits."""
        ...

    def gather(self, item: Item) -> list[Item]:
        """Every rank's item, in order of ranks. Items are small and can be pickled."""
        ...


class Alone:
    """One process: everything is its own."""

    rank = 0
    size = 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """See Ranks."""
        return tensor

    def gather(self, item: Item) -> list[Item]:
        """See Ranks."""
        return [item]


ALONE: Ranks = Alone()


class ProcessGroup:
    """The processes of a torch.distributed group, by default of all. Raises ConfigError when there is none yet."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError("no process group; call torch.distributed.init_process_group first")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def sum_(self, tensor: Tensor) -> Tensor:
        """See Ranks."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, item: Item) -> list[Item]:
        """See Ranks."""
        found: list[Item | None] = [None] * self.size
        dist.all_gather_object(found, item, group=self.group)
        return found  # pyright: ignore[reportReturnType]  all are filled in by now
