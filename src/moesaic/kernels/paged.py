"""Keys and values in blocks of 32 tokens, found through tables: what csrc/paged.h lays out, as tensors.

T tokens of a step, S sequences, W blocks of a table, N blocks in all, G key/value heads, A numbers of a key, V of a
value.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.checks import require

BLOCK_TOKENS = 32
_PITCH = 16  # a token's values fill whole sixteens


class PagedCache(NamedTuple):
    """fp32 or bf16 keys [N, G, A, 32] and values [N, G, 32, V in whole sixteens].

    Without values, keys [N, 32, A in whole sixteens] of one head are shared: their first V numbers are the values, too.
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
        """k_TGA of those slots of those blocks."""
        if self.values is None:
            return self.keys[ids_T, slots_T, None, : self.key_dim]
        return self.keys[ids_T, :, :, slots_T]

    def values_at(self, ids_T: Tensor, slots_T: Tensor) -> Tensor:
        """v_TGV of those slots of those blocks."""
        if self.values is None:
            return self.keys[ids_T, slots_T, None, : self.value_dim]
        return self.values[ids_T, :, slots_T, : self.value_dim]


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
    num_blocks: int, num_groups: int, key_dim: int, value_dim: int, *, dtype: torch.dtype, shared: bool = False
) -> PagedCache:
    """A cache of zeros. shared: the first `value_dim` numbers of a token's one key are its value (arXiv:2405.04434).

    Raises ConfigError for another dtype than fp32 and bf16, and for shared keys of several heads, or narrower than
    their values.
    """
    require(dtype in (torch.float32, torch.bfloat16), f"a cache of {dtype}; use torch.float32 or torch.bfloat16")
    if not shared:
        keys = torch.zeros(num_blocks, num_groups, key_dim, BLOCK_TOKENS, dtype=dtype)
        values = torch.zeros(num_blocks, num_groups, BLOCK_TOKENS, _padded(value_dim), dtype=dtype)
        return PagedCache(keys, values, key_dim, value_dim)
    require(num_groups == 1, f"{num_groups} shared key/value heads; a latent is one")
    require(value_dim <= key_dim, f"values of {value_dim} numbers in keys of {key_dim}; they are a part of these")
    return PagedCache(torch.zeros(num_blocks, BLOCK_TOKENS, _padded(key_dim), dtype=dtype), None, key_dim, value_dim)


def _padded(size: int) -> int:
    return -(-size // _PITCH) * _PITCH
