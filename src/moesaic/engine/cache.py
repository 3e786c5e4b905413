"""The block-table cache: every layer's keys and values in blocks, which texts hold by number and not by place."""

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
        self.ahead = {depth: min(places, max(0, self.length - depth)) for depth, places in self.ahead.items()}


class BlockCache:
    """Blocks of all layers, as many as texts have asked for so far; block i of each layer holds the same tokens.

    layers: keys and values, uint8 [blocks, bytes of one].
    format: of the numbers in them (kernels.paged). max_blocks: no more than these; None: while memory lasts.
    """

    def __init__(self, shapes: list[CacheShape], *, format: CacheFormat, max_blocks: int | None = None) -> None:
        self.format: CacheFormat = format
        self.max_blocks = max_blocks
        self._block_bytes = [_native.Program.cache_block_bytes(shape, format) for shape in shapes]
        self.layers = [(_blocks(0, keys), _blocks(0, values)) for keys, values in self._block_bytes]
        self._free: list[int] = []
        self.num_blocks = 0

    @property
    def bytes_per_token(self) -> float:
        """Of all layers."""
        return sum(map(sum, self._block_bytes)) / BLOCK_TOKENS

    def make_room(self, text: Text, length: int) -> bool:
        """Give a text the blocks for `length` tokens. Whether the layers' tensors are new ones because of it.

        Raises GenerationError when no more blocks may be made; the text then has what it had.
        """
        missing = -(-length // BLOCK_TOKENS) - len(text.blocks)
        grown = missing > len(self._free)
        if grown:
            self._grow(missing - len(self._free))
        text.blocks += [self._free.pop() for _ in range(missing)]
        return grown

    def cut(self, text: Text, length: int) -> None:
        """Forget all tokens of a text from `length` on."""
        kept = -(-length // BLOCK_TOKENS)
        self._free += text.blocks[kept:]
        del text.blocks[kept:]
        text.length = min(text.length, length)
        text.forget_ahead()

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
        self.layers = [(_longer(keys, wanted), _longer(values, wanted)) for keys, values in self.layers]
        self._free += range(wanted - 1, self.num_blocks - 1, -1)
        self.num_blocks = wanted


def _blocks(count: int, size: int) -> Tensor:
    return torch.empty(count, size, dtype=torch.uint8)


def _longer(blocks: Tensor, count: int) -> Tensor:
    longer = _blocks(count, blocks.shape[1])
    longer[: len(blocks)] = blocks
    return longer
