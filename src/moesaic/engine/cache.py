"""The block-table cache: every layer's keys and values in blocks, which texts hold by number and not by place."""

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moesaic.engine.builder import CacheShape
from moesaic.errors import GenerationError
from moesaic.kernels.backend import compiled
from moesaic.kernels.paged import CacheFormat

_native = compiled()
BLOCK_TOKENS: int = _native.Program.block_tokens
_FIRST_BLOCKS = 16


@dataclass(eq=False)
class Text:
    """What a cache holds of one text: how many tokens, and the blocks that hold 32 of them each, in order.

    ahead: of each layer k = 1, 2, ... that predicts further tokens, at how many places from the first on it has run; at
    place i it reads token i + k.
    """

    length: int = 0
    blocks: list[int] = field(default_factory=list)
    ahead: dict[int, int] = field(default_factory=dict)

    def forget_ahead(self) -> None:
        """Forget what those layers made of tokens that the text does not hold."""
        if self.ahead:
            self.ahead = {depth: min(places, max(0, self.length - depth)) for depth, places in self.ahead.items()}


class BlockCache:
    """Blocks of all layers, as many as texts have asked for so far; block i of each layer holds the same tokens.

    A block may have several holders (`hold`), and is free again when the last of them lets go. Who writes to one that
    others hold too gets a copy of it.
    layers: keys and values, uint8 [blocks, bytes of one].
    format: of the numbers in them (kernels.paged). max_blocks: no more than these; None: while memory lasts.
    reclaim: asked for so many blocks when none can be made; who holds some that can be done without lets go of them.
    """

    def __init__(self, shapes: list[CacheShape], *, format: CacheFormat, max_blocks: int | None = None) -> None:
        self.format: CacheFormat = format
        self.max_blocks = max_blocks
        self._block_bytes = [_native.Program.cache_block_bytes(shape, format) for shape in shapes]
        self.layers = [(_blocks(0, keys), _blocks(0, values)) for keys, values in self._block_bytes]
        self.reclaim: Callable[[int], None] | None = None
        self._free: list[int] = []
        self._holders: list[int] = []
        self.num_blocks = 0

    @property
    def bytes_per_token(self) -> float:
        """Of all layers."""
        return self.bytes_per_block / BLOCK_TOKENS

    @property
    def bytes_per_block(self) -> int:
        """Of all layers."""
        return sum(map(sum, self._block_bytes))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, made or yet to be made; only where there is a limit."""
        assert self.max_blocks is not None, "a cache without a limit"
        return len(self._free) + self.max_blocks - self.num_blocks

    def holders(self, block: int) -> int:
        """How many hold a block."""
        return self._holders[block]

    def hold(self, blocks: Sequence[int]) -> None:
        """Be a further holder of blocks that somebody holds."""
        for block in blocks:
            self._holders[block] += 1

    def let_go(self, blocks: Sequence[int]) -> None:
        """Hold blocks no longer."""
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)

    def make_room(self, text: Text, length: int, start: int | None = None) -> bool:
        """Give a text the blocks for `length` tokens, those from `start` on (None: from its end) to be written.

        Whether the layers' tensors are new ones because of it. Raises GenerationError when no more blocks may be made;
        the text then has what it had.
        """
        first = (text.length if start is None else start) // BLOCK_TOKENS
        shared = [place for place in range(first, len(text.blocks)) if self._holders[text.blocks[place]] > 1]
        missing = -(-length // BLOCK_TOKENS) - len(text.blocks)
        if missing <= 0 and not shared:
            return False
        grown = self._have_free(max(missing, 0) + len(shared))
        for place in shared:
            text.blocks[place] = self._copy(text.blocks[place])
        text.blocks += [self._take() for _ in range(missing)]
        return grown

    def cut(self, text: Text, length: int) -> None:
        """Forget all tokens of a text from `length` on."""
        kept = -(-length // BLOCK_TOKENS)
        self.let_go(text.blocks[kept:])
        del text.blocks[kept:]
        text.length = min(text.length, length)
        text.forget_ahead()

    def reserve(self, num_blocks: int) -> None:
        """Make so many blocks now, and no more later, so that none are ever copied for want of room.

        Raises GenerationError where there are more already.
        """
        if num_blocks < self.num_blocks:
            raise GenerationError(f"{num_blocks} blocks for a cache that has {self.num_blocks}; reserve them at first")
        self.max_blocks = num_blocks
        if num_blocks > self.num_blocks:
            self._extend(num_blocks)

    def _take(self) -> int:
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def _copy(self, block: int) -> int:
        """A block with the same content, for one of its holders."""
        own = self._take()
        for keys, values in self.layers:
            keys[own], values[own] = keys[block], values[block]
        self.let_go([block])
        return own

    def _have_free(self, count: int) -> bool:
        """See to it that so many blocks are free. Whether more were made."""
        growth = count if self.max_blocks is None else self.max_blocks - self.num_blocks
        short = count - len(self._free) - growth
        if short > 0 and self.reclaim is not None:
            self.reclaim(short)
        if len(self._free) >= count:
            return False
        self._grow(count - len(self._free))
        return True

    def _grow(self, missing: int) -> None:
        """At least so many further blocks: twice as many as there are, so that copying them is rare."""
        wanted = self.num_blocks + max(missing, self.num_blocks, _FIRST_BLOCKS)
        if self.max_blocks is not None:
            wanted = min(wanted, self.max_blocks)
        if wanted < self.num_blocks + missing:
            raise GenerationError(
                f"the cache holds {self.num_blocks * BLOCK_TOKENS:,} tokens and may not grow; "
                "end a text, or give the engine more room"
            )
        self._extend(wanted)

    def _extend(self, wanted: int) -> None:
        self.layers = [(_longer(keys, wanted), _longer(values, wanted)) for keys, values in self.layers]
        self._free[:0] = range(wanted - 1, self.num_blocks - 1, -1)  # those made first are taken first
        self._holders += [0] * (wanted - self.num_blocks)
        self.num_blocks = wanted


def _blocks(count: int, size: int) -> Tensor:
    """Pages of their own: they come as they are written to and go back when they are freed. malloc would keep what
    caches were copied from, half as much again."""
    if not count * size:
        return torch.empty(count, size, dtype=torch.uint8)
    pages = mmap.mmap(-1, count * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).view(count, size)


def _longer(blocks: Tensor, count: int) -> Tensor:
    longer = _blocks(count, blocks.shape[1])
    longer[: len(blocks)] = blocks
    return longer
