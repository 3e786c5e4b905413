"""Rotary positions (RoFormer, arXiv:2104.09864, eq. 34), in the half-split layout: dimension i turns with i + A/2.

B batch, S sequence, H heads, A head dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.config import RopeConfig
from moesaic.kernels import ops


class Rotation(NamedTuple):
    """Cosines and sines [B, S, 1, A] of every position, ready to multiply heads [B, S, H, A]."""

    cos: Tensor
    sin: Tensor


def rotation(config: RopeConfig, head_dim: int, positions_BS: Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation of each position: angle = position * theta^(-2i/A), computed in fp32."""
    dims = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device)
    frequencies = 1.0 / (config.theta ** (dims / head_dim))
    angles = positions_BS[:, :, None, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x_BSHA: Tensor, turn: Rotation) -> Tensor:
    """Turn query or key heads by their positions: (x1 cos - x2 sin, x2 cos + x1 sin) of the halves x1, x2."""
    return ops.rotate(x_BSHA, *turn)
