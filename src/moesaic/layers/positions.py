"""Positions that are not rotations: biases of scores by distance, and waves added to embeddings.

B batch, S new tokens, N visible slots, H heads, D hidden.
"""

import math

import torch
from torch import Tensor, nn

from moesaic.config import RelativeBiasConfig, SinusoidConfig


class RelativeBias(nn.Module):
    """A learned number for each head and bucket of distances (T5, arXiv:1910.10683, sec. 2.1)."""

    def __init__(self, config: RelativeBiasConfig, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_buckets, num_heads))

    def forward(self, slots_S: Tensor, slots_N: Tensor, *, causal: bool) -> Tensor:
        """What is added to the scores [1, H, S, N] of tokens in `slots_S` that look at those in `slots_N`."""
        buckets_SN = relative_buckets(slots_N - slots_S[:, None], self.config, causal=causal)
        return self.weight[buckets_SN].permute(2, 0, 1)[None]


def relative_buckets(distances: Tensor, config: RelativeBiasConfig, *, causal: bool) -> Tensor:
    """The bucket of each distance, int64; above 0 are tokens that come later (mesh, `_relative_position_bucket`).

    Of n buckets, half are for the distances below n / 2, one each; the bounds of the others grow geometrically up to
    `max_distance`. Where tokens see later ones, n is half of all, and the upper half is for what comes later.
    """
    count, first = config.num_buckets, torch.zeros_like(distances)
    if causal:
        distances = (-distances).clamp(min=0)
    else:
        count //= 2
        first = (distances > 0).long() * count
        distances = distances.abs()
    exact = count // 2
    growth = (count - exact) / math.log(config.max_distance / exact)
    # As fp32 has it: at the bounds the released models' buckets are those of its rounding.
    further = exact + (torch.log(distances.clamp(min=1).float() / exact) * growth).long()
    return first + torch.where(distances < exact, distances, further.clamp(max=count - 1))


def sinusoids(config: SinusoidConfig, positions_BS: Tensor, size: int) -> Tensor:
    """x_BSD: sines, then cosines of positions over wave lengths that grow geometrically, in fp32.

    Where D is odd the last is 0 (tensor2tensor, `get_timing_signal_1d`).
    """
    half = size // 2
    rates = torch.exp(torch.arange(half, device=positions_BS.device).float() * -(math.log(config.base) / (half - 1)))
    angles = (positions_BS + config.first).float()[..., None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return torch.nn.functional.pad(waves, (0, size % 2))
