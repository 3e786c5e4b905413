"""Rotary positions (RoFormer, arXiv:2104.09864, eq. 34), in the half-split layout: dimension i turns with i + A/2.

B batch, S sequence, H heads, A head dim.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.config import RopeConfig


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
    if torch.is_grad_enabled() and x_BSHA.requires_grad:
        return _Rotate.apply(x_BSHA, *turn)  # pyright: ignore[reportReturnType]
    return _rotate(x_BSHA, *turn)


class _Rotate(torch.autograd.Function):
    """Two passes each way where autograd would take seven; the gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x_BSHA: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x_BSHA, cos, sin)

    @staticmethod
    def backward(ctx: Any, *dy_BSHA: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy_BSHA[0], cos, -sin), None, None


def _rotate(x_BSHA: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x_BSHA.shape[-1] // 2
    first, second, sin = x_BSHA[..., :half], x_BSHA[..., half:], sin[..., :half]
    turned = x_BSHA * cos
    turned[..., :half].addcmul_(second, sin, value=-1)
    turned[..., half:].addcmul_(first, sin)
    return turned
