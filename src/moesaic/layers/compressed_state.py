"""What compressed attention keeps of the past: the last tokens of each row, and its entries.

B batch, S new tokens, T kept and new ones, M entries. Rows are counted by their own tokens: padding is never kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.config import CompressedAttentionConfig
from moesaic.layers.windows import in_order, take


class Tail:
    """The last `length` tokens of each row, in order: their positions, and numbers of several kinds of them."""

    def __init__(
        self, sizes: Sequence[int], length: int, batch_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.length = length
        self.positions_BN = torch.empty(batch_size, 0, dtype=torch.int64, device=device)
        self.kept = tuple(torch.empty(batch_size, 0, size, dtype=dtype, device=device) for size in sizes)

    def extend(self, positions_BS: Tensor, new: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Positions and numbers of the kept and the new tokens; then keeps the last of them. Position -1: no token."""
        positions_BS = positions_BS.expand(len(self.positions_BN), -1)
        positions_BT = torch.cat([self.positions_BN, positions_BS], dim=1)
        both = tuple(torch.cat([kept, part], dim=1) for kept, part in zip(self.kept, new, strict=True))
        last_BN = in_order(positions_BT)[:, max(0, positions_BT.shape[1] - self.length) :]
        self.positions_BN = positions_BT.gather(1, last_BN)
        self.kept = tuple(take(part, last_BN) for part in both)
        return positions_BT, both

    def clear(self) -> None:
        self.positions_BN = self.positions_BN[:, :0]
        self.kept = tuple(part[:, :0] for part in self.kept)


class CompressedState:
    """The last `window` tokens, what is yet to go into entries, and the entries so far.

    max_length: so many tokens a row has at most. Entries of a row stand in front, as many as counts_B says.
    """

    def __init__(
        self,
        config: CompressedAttentionConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.window = Tail((config.head_dim,), config.window, batch_size, dtype, device)
        self.counts_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        compression, sizes = config.compression, config.entry_sizes
        ratio = 1 if compression is None else compression.ratio
        source_sizes = () if compression is None else tuple(map(compression.source_size, sizes))
        pending = 0 if compression is None else compression.pending
        self.pending = Tail(source_sizes, pending, batch_size, dtype, device)
        self.entries = tuple(
            torch.zeros(batch_size, max_length // ratio, size, dtype=dtype, device=device) for size in sizes
        )

    def add_entries(self, new: Sequence[Tensor], real_BM: Tensor) -> tuple[Tensor, ...]:
        """Keep those new entries that are real; all entries so far, of each kind."""
        rows, places = real_BM.expand(len(self.counts_B), -1).nonzero(as_tuple=True)
        for kept, part in zip(self.entries, new, strict=True):
            kept[rows, self.counts_B[rows] + places] = part[rows, places]
        self.counts_B = self.counts_B + real_BM.sum(1)
        most = int(self.counts_B.max())
        return tuple(kept[:, :most] for kept in self.entries)

    def clear(self) -> None:
        self.window.clear()
        self.pending.clear()
        self.counts_B = torch.zeros_like(self.counts_B)
