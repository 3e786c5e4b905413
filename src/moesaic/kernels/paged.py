"""Keys and values in blocks of 32 tokens, found through tables: what csrc/paged.h lays out, as tensors.

T tokens of a step, S sequences, W blocks of a table, N blocks in all, G key/value heads, A numbers of a key, V of a
value, C scales of a token: one for each 32 of its numbers.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moesaic.checks import require

BLOCK_TOKENS = 32
SCALE_NUMBERS = 32
_PITCH = 16  # a token's values fill whole sixteens

CacheFormat = Literal["fp32", "bf16", "int8"]
"""What a cache keeps of a number. int8: whole multiples, at most 127, of a scale in bf16 that 32 numbers share, so that
none is off by more than half of it; 8.5 bits each."""
CACHE_FORMATS: tuple[CacheFormat, ...] = ("fp32", "bf16", "int8")


class PagedCache(NamedTuple):
    """fp32 or bf16 keys [N, G, A, 32] and values [N, G, 32, V in whole sixteens].

    Without values, keys [N, 32, A in whole sixteens] of one head are shared: their first V numbers are the values, too.
    In 8 bits both are bytes, [N, G, bytes] or shared [N, bytes]: numbers in the same order, and scales [C, 32] in bf16.
    """

    keys: Tensor
    values: Tensor | None
    key_dim: int
    value_dim: int

    @property
    def num_groups(self) -> int:
        return 1 if self.values is None else self.keys.shape[1]

    @property
    def block_bytes(self) -> int:
        """What a block of 32 tokens takes, padding included."""
        parts = (self.keys,) if self.values is None else (self.keys, self.values)
        return sum(part[0].nbytes for part in parts)

    def keys_at(self, ids_T: Tensor, slots_T: Tensor) -> Tensor:
        """k_TGA of those slots of those blocks; of 8 bits as fp32, which holds them exactly."""
        if self.keys.dtype == torch.uint8:
            numbers, scales_NGCS = self.rounded_keys
            numbers_TGA = numbers[ids_T, :, slots_T] if self.values is None else numbers[ids_T, :, :, slots_T]
            return _widened(numbers_TGA, scales_NGCS[ids_T, :, :, slots_T])[..., : self.key_dim]
        if self.values is None:
            return self.keys[ids_T, slots_T, None, : self.key_dim]
        return self.keys[ids_T, :, :, slots_T]

    def values_at(self, ids_T: Tensor, slots_T: Tensor) -> Tensor:
        """v_TGV of those slots of those blocks; of 8 bits as fp32."""
        if self.values is None:
            return self.keys_at(ids_T, slots_T)[..., : self.value_dim]
        if self.values.dtype == torch.uint8:
            numbers_NGSV, scales_NGCS = self.rounded_values
            numbers_TGV = numbers_NGSV[ids_T, :, slots_T]
            return _widened(numbers_TGV, scales_NGCS[ids_T, :, :, slots_T])[..., : self.value_dim]
        return self.values[ids_T, :, slots_T, : self.value_dim]

    @property
    def rounded_keys(self) -> tuple[Tensor, Tensor]:
        """Views of keys in 8 bits: numbers [N, G, A, 32], or shared [N, 1, 32, A in whole sixteens]; scales_NGCS."""
        if self.values is None:
            return _parts(self.keys[:, None], (BLOCK_TOKENS, _padded(self.key_dim)))
        return _parts(self.keys, (self.key_dim, BLOCK_TOKENS))

    @property
    def rounded_values(self) -> tuple[Tensor, Tensor]:
        """Views of values in 8 bits: numbers [N, G, 32, V in whole sixteens], and scales_NGCS."""
        assert self.values is not None, "values that are keys are rounded as keys"
        return _parts(self.values, (BLOCK_TOKENS, _padded(self.value_dim)))


def _parts(tiles_NGb: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Numbers of this shape, and the scales behind them."""
    size = shape[0] * shape[1]
    scales = tiles_NGb[..., size:].view(torch.bfloat16)
    return tiles_NGb[..., :size].view(torch.int8).unflatten(-1, shape), scales.unflatten(-1, (-1, BLOCK_TOKENS))


def _widened(numbers_TGA: Tensor, scales_TGC: Tensor) -> Tensor:
    scales_TGA = scales_TGC.float().repeat_interleave(SCALE_NUMBERS, dim=-1)[..., : numbers_TGA.shape[-1]]
    return numbers_TGA.float() * scales_TGA


def round_numbers(x_TGA: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers_TGA, scales_TGC): whole multiples (int8) of a scale in bf16 for each 32 numbers of a token and head.

    A scale is the highest of its numbers over 127, so that none is off by more than half of it; NaN where one of them
    is infinite or none.
    """
    size = x_TGA.shape[-1]
    padded = torch.nn.functional.pad(x_TGA.float(), (0, -size % SCALE_NUMBERS)).unflatten(-1, (-1, SCALE_NUMBERS))
    highest_TGC = padded.abs().amax(-1)
    scales_TGC = (highest_TGC / 127).where(highest_TGC.isfinite(), torch.nan).bfloat16()
    by_TGC1 = scales_TGC.float().where(scales_TGC > 0, 1.0)[..., None]
    numbers = (padded / by_TGC1).round().clamp(-127, 127).where(scales_TGC[..., None].isfinite(), 0.0)
    return numbers.flatten(-2)[..., :size].to(torch.int8), scales_TGC


class PagedTokens(NamedTuple):
    """Where the tokens of a step stand.

    positions_T (int64): each in its sequence. sequence_of_T (int32): each one's row of tables_SW (int32), which name
    the blocks of a sequence's positions, 32 a block. Entries that no token looks at may be anything.
    """

    positions_T: Tensor
    sequence_of_T: Tensor
    tables_SW: Tensor

    def places(self) -> tuple[Tensor, Tensor]:
        """The block and the slot in it of each token."""
        tables = self.tables_SW[self.sequence_of_T.long(), self.positions_T // BLOCK_TOKENS]
        return tables.long(), self.positions_T % BLOCK_TOKENS

    def seen_by(self, token: int, *, window: int | None, chunk: int | None) -> tuple[Tensor, Tensor]:
        """Blocks and slots of the positions that a token sees, in their order.

        The last one is its own; the first one is 0, or that of its chunk, or of the last `window`.
        """
        position = int(self.positions_T[token])
        first = 0 if chunk is None else position // chunk * chunk
        first = first if window is None else max(0, position - window + 1)
        seen = torch.arange(first, position + 1)
        table_W = self.tables_SW[int(self.sequence_of_T[token])].long()
        return table_W[seen // BLOCK_TOKENS], seen % BLOCK_TOKENS


def paged_cache(
    num_blocks: int, num_groups: int, key_dim: int, value_dim: int, *, format: CacheFormat, shared: bool = False
) -> PagedCache:
    """A cache of zeros. shared: the first `value_dim` numbers of a token's one key are its value (arXiv:2405.04434).

    Raises ConfigError for another format than there are, and for shared keys of several heads, or narrower than their
    values.
    """
    require(format in CACHE_FORMATS, f"a cache in {format!r}; use {', '.join(CACHE_FORMATS)}")
    if shared:
        require(num_groups == 1, f"{num_groups} shared key/value heads; a latent is one")
        require(value_dim <= key_dim, f"values of {value_dim} numbers in keys of {key_dim}; they are a part of these")
    key_shape = (BLOCK_TOKENS, _padded(key_dim)) if shared else (num_groups, key_dim, BLOCK_TOKENS)
    value_shape = (num_groups, BLOCK_TOKENS, _padded(value_dim))
    if format == "int8":
        key_shape, value_shape = (_in_bytes(key_shape, key_dim), _in_bytes(value_shape, value_dim))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}[format]
    values = None if shared else torch.zeros(num_blocks, *value_shape, dtype=dtype)
    return PagedCache(torch.zeros(num_blocks, *key_shape, dtype=dtype), values, key_dim, value_dim)


def _in_bytes(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Of tiles of 8 bits, whose tokens have `size` numbers, the shape in bytes."""
    scale_bytes = 2 * -(-size // SCALE_NUMBERS) * BLOCK_TOKENS
    return (*shape[:-2], shape[-2] * shape[-1] + scale_bytes)


def _padded(size: int) -> int:
    return -(-size // _PITCH) * _PITCH
