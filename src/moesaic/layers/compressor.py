"""Entries that stand for windows of tokens (DeepSeek-V4's technical report, sec. 2.3).

B batch, S new tokens, N tokens at hand, M windows, r tokens in each, W the width of an entry, D hidden.
"""

import torch
from torch import Tensor, nn

from moesaic.config import CompressionConfig, NormConfig
from moesaic.layers.norm import norm
from moesaic.layers.rope import Rotation, rotate_last
from moesaic.layers.windows import Windows, take


class Compressor(nn.Module):
    """Makes one entry of each window: the sum over its tokens of softmax(gate + bias) * value, per dimension, normed.

    Equations 20-23 of the report, or with `overlap` 9-12: there the first halves of values and gates speak for a token
    in the window after its own, the second halves in its own.
    """

    def __init__(self, config: CompressionConfig, head_dim: int, hidden_size: int, norm_config: NormConfig) -> None:
        super().__init__()
        self.overlap = config.overlap
        size = config.source_size(head_dim) // 2
        self.position_bias = nn.Parameter(torch.empty(config.ratio, size, dtype=torch.float32))
        self.kv_proj = nn.Linear(hidden_size, size, bias=False)
        self.gate_proj = nn.Linear(hidden_size, size, bias=False)
        self.kv_norm = norm(norm_config, head_dim)

    def source(self, x_BSD: Tensor) -> Tensor:
        """What tokens bring to entries: values, then gates, [B, S, `source_size`]."""
        return torch.cat([self.kv_proj(x_BSD), self.gate_proj(x_BSD)], dim=-1)

    def forward(self, source_BNC: Tensor, windows: Windows, turn: Rotation) -> Tensor:
        """entries_BMW. source_BNC: of the tokens at hand. turn: of the windows' first positions."""
        values, gates = self._of(source_BNC, windows.slots_BMr)
        if self.overlap:
            values_before, gates_before = self._of(source_BNC, windows.before_BMr)
            is_first_BM11 = (windows.numbers_BM == 0)[:, :, None, None]
            gates = _halves(gates_before.masked_fill(is_first_BM11, float("-inf")), gates)
            values = _halves(values_before, values)
        weights = gates.softmax(2, dtype=torch.promote_types(gates.dtype, torch.float32)).to(values.dtype)
        entries_BMW = self.kv_norm((values * weights).sum(2))
        return rotate_last(entries_BMW[:, :, None], turn)[:, :, 0]

    def _of(self, source_BNC: Tensor, slots_BMr: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gates, bias included, of the tokens of windows, [B, M, r, W or 2W]."""
        taken = take(source_BNC, slots_BMr.flatten(1)).unflatten(1, slots_BMr.shape[1:])
        values, gates = taken.chunk(2, dim=-1)
        return values, gates + self.position_bias


def _halves(before: Tensor, own: Tensor) -> Tensor:
    """The first halves of the windows before and the second ones of the windows themselves, [B, M, 2r, W]."""
    return torch.cat([before.chunk(2, dim=-1)[0], own.chunk(2, dim=-1)[1]], dim=2)
