"""Residual streams, and how the parts of a layer read and write them (mHC, arXiv:2512.24880; DeepSeek-V4).

B batch, S sequence, N streams, D hidden. All coefficients are computed in fp32, or wider where the streams are.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesaic.config import HyperConnectionConfig


class _Coefficients(nn.Module):
    """Numbers for every token, linear in its streams, which are divided by the root mean square of all of them.

    Learned, and never narrower than fp32: `weight` [rows, N*D], `bias` [rows], and a `scale` for each group of rows.
    """

    def __init__(self, config: HyperConnectionConfig, hidden_size: int, groups: list[int]) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        rows = sum(groups)
        self.weight = nn.Parameter(torch.empty(rows, config.num_streams * hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(rows, dtype=torch.float32))
        self.scale = nn.Parameter(torch.empty(len(groups), dtype=torch.float32))

    def coefficients(self, wide_BSND: Tensor) -> tuple[Tensor, ...]:
        """scale * (weight x) + bias, group by group."""
        dtype = wide_BSND.dtype
        flat = wide_BSND.flatten(-2)
        flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.config.norm_eps)
        projected = linear(flat, self.weight.to(dtype)).split(self.groups, dim=-1)
        biases, scales = self.bias.to(dtype).split(self.groups), self.scale.to(dtype).unbind()
        return tuple(part * scale + bias for part, scale, bias in zip(projected, scales, biases, strict=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module's, but bf16 and fp16 are for the model around it: gates that are nearly closed need fp32."""

        def apply(values: Tensor) -> Tensor:
            changed = fn(values)
            return values.to(changed.device) if changed.dtype in (torch.bfloat16, torch.float16) else changed

        return super()._apply(apply, recurse)


class HyperConnection(_Coefficients):
    """What stands in for the residual connection around a part f of a layer (norm and all).

    a, b and C are a token's own: a = sigmoid(.) + eps, b = 2 sigmoid(.), and C is positive with rows and columns that
    sum to 1 (`doubly_stochastic`). The part reads one vector, y = f(sum_i a_i x_i), and stream j becomes
    b_j y + sum_i C_ij x_i: it is C's columns that weigh what a stream is made of.
    """

    def __init__(self, config: HyperConnectionConfig, hidden_size: int) -> None:
        n = config.num_streams
        super().__init__(config, hidden_size, [n, n, n * n])

    def forward(self, streams_BSND: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        """The streams after `part`, which is given x_BSD and returns y_BSD."""
        config, narrow = self.config, streams_BSND.dtype
        wide_BSND = streams_BSND.to(torch.promote_types(narrow, torch.float32))
        read_BSN, write_BSN, mix = self.coefficients(wide_BSND)
        read_BSN = read_BSN.sigmoid() + config.eps
        mix_BSNN = doubly_stochastic(mix.unflatten(-1, (config.num_streams, -1)), config)
        out_BSD = part(_weighted(read_BSN, wide_BSND).to(narrow))
        written_BSND = (2 * write_BSN.sigmoid())[..., None] * out_BSD[..., None, :]
        return (written_BSND + mix_BSNN.mT @ wide_BSND).to(narrow)


class StreamJoin(_Coefficients):
    """Streams of the same vector at the begin of a stack, and one vector of them at its end: sum_i a_i x_i."""

    def __init__(self, config: HyperConnectionConfig, hidden_size: int) -> None:
        super().__init__(config, hidden_size, [config.num_streams])

    def split(self, x_BSD: Tensor) -> Tensor:
        """streams_BSND, all alike."""
        return x_BSD[..., None, :].expand(*x_BSD.shape[:-1], self.config.num_streams, -1)

    def forward(self, streams_BSND: Tensor) -> Tensor:
        """x_BSD, by a = sigmoid(.) + eps."""
        wide_BSND = streams_BSND.to(torch.promote_types(streams_BSND.dtype, torch.float32))
        (read_BSN,) = self.coefficients(wide_BSND)
        return _weighted(read_BSN.sigmoid() + self.config.eps, wide_BSND).to(streams_BSND.dtype)


def doubly_stochastic(logits: Tensor, config: HyperConnectionConfig) -> Tensor:
    """Positive matrices of which rows and columns sum to about 1 (Sinkhorn and Knopp, Pacific J. Math. 21(2), 1967).

    Softmax of each row + eps, divided by the sums of columns; then `sinkhorn_steps` - 1 times of rows and of columns.
    Every sum is taken + eps. Columns come last, so theirs are closest to 1.
    """
    eps = config.eps
    matrix = logits.softmax(-1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(config.sinkhorn_steps - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def _weighted(weights_BSN: Tensor, streams_BSND: Tensor) -> Tensor:
    return (weights_BSN[..., None, :] @ streams_BSND).squeeze(-2)
