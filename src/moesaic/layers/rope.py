"""Rotary positions (RoFormer, arXiv:2104.09864, eq. 34): the angles of every position, and heads turned by them.

B batch, S sequence, H heads, A head dim, R of them that turn, P = R/2 pairs.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moesaic.config import LinearConfig, Llama3Config, LongRopeConfig, RopeConfig, YarnConfig
from moesaic.kernels import ops


class Rotation(NamedTuple):
    """Cosines and sines [B, S, 1, R] of every position, the halves alike; layout: which dimensions are pairs."""

    cos: Tensor
    sin: Tensor
    layout: Literal["half", "interleaved"] = "half"

    @property
    def back(self) -> "Rotation":
        """The rotation the other way round."""
        return self._replace(sin=-self.sin)


def rotation(
    config: RopeConfig, head_dim: int, positions_BS: Tensor, dtype: torch.dtype, lengths_BS: Tensor | None = None
) -> Rotation:
    """The rotation of each position, computed in fp32.

    lengths_BS: of the text that each position is in, so far; None: up to the last position of its row.
    """
    places = positions_BS[:, :, None, None].float()
    angles, magnitude = places * frequencies(config, head_dim, positions_BS.device), config.magnitude
    if isinstance(config.scaling, LongRopeConfig):
        lengths_BS = positions_BS.amax(1, keepdim=True) + 1 if lengths_BS is None else lengths_BS
        is_long = (lengths_BS > config.scaling.original_length)[:, :, None, None]
        long_angles = places * frequencies(config, head_dim, positions_BS.device, is_long=True)
        angles = torch.where(is_long, long_angles, angles)
        magnitude = torch.where(is_long, config.scaling.long_mscale, magnitude)
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    return Rotation(cos.to(dtype), sin.to(dtype), config.layout)


def frequencies(
    config: RopeConfig, head_dim: int, device: torch.device | str = "cpu", *, is_long: bool = False
) -> Tensor:
    """The angle [P] by which each pair turns from one position to the next: theta^(-2i/R), stretched.

    is_long: as in texts that are longer than LongRoPE's `original_length`.
    """
    turning = config.turning(head_dim)
    dims_P = torch.arange(0, turning, 2, dtype=torch.float32, device=device)
    powers_P = config.theta ** (dims_P / turning)
    if isinstance(config.scaling, LongRopeConfig):
        factors = config.scaling.long_factor if is_long else config.scaling.short_factor
        return 1.0 / (torch.tensor(factors, dtype=torch.float32, device=device) * powers_P)
    return 1.0 / powers_P if config.scaling is None else _SCALED[type(config.scaling)](powers_P, config.scaling, config)


def rotate(x_BSHA: Tensor, turn: Rotation) -> Tensor:
    """Turn query or key heads by their positions: (x1 cos - x2 sin, x2 cos + x1 sin) of the pairs x1, x2."""
    turning = turn.cos.shape[-1]
    if turning < x_BSHA.shape[-1]:
        return torch.cat([rotate(x_BSHA[..., :turning], turn), x_BSHA[..., turning:]], dim=-1)
    if turn.layout == "half":
        return ops.rotate(x_BSHA, turn.cos, turn.sin)
    halves = torch.cat([x_BSHA[..., 0::2], x_BSHA[..., 1::2]], dim=-1)
    first, second = ops.rotate(halves, turn.cos, turn.sin).chunk(2, dim=-1)
    return torch.stack([first, second], dim=-1).flatten(-2)


def rotate_last(x_BSHA: Tensor, turn: Rotation) -> Tensor:
    """As `rotate`, but the last dimensions turn where not all do."""
    still = x_BSHA.shape[-1] - turn.cos.shape[-1]
    if still == 0:
        return rotate(x_BSHA, turn)
    return torch.cat([x_BSHA[..., :still], rotate(x_BSHA[..., still:], turn)], dim=-1)


def _linear(powers_P: Tensor, scaling: LinearConfig, _: RopeConfig) -> Tensor:
    return 1.0 / powers_P / scaling.factor


def _yarn(powers_P: Tensor, scaling: YarnConfig, config: RopeConfig) -> Tensor:
    """arXiv:2309.00071, sec. 3.2: fast pairs keep their frequency, slow ones have it divided by the factor."""
    num_pairs = len(powers_P)

    def pair_that_turns(times: float) -> float:
        in_training = scaling.original_length / (times * 2 * math.pi)
        return 2 * num_pairs * math.log(in_training) / (2 * math.log(config.theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_pairs - 1)
    width = (high - low) or 0.001  # as in the authors' code: a step
    kept_P = 1 - ((torch.arange(num_pairs, dtype=torch.float32, device=powers_P.device) - low) / width).clamp(0, 1)
    return 1.0 / (scaling.factor * powers_P) * (1 - kept_P) + 1.0 / powers_P * kept_P


def _llama3(powers_P: Tensor, scaling: Llama3Config, _: RopeConfig) -> Tensor:
    plain_P = 1.0 / powers_P
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns_P = scaling.original_length / (2 * math.pi / plain_P)
    if low == high:
        return torch.where(turns_P < low, plain_P / scaling.factor, plain_P)
    share_P = ((turns_P - low) / (high - low)).clamp(0, 1)
    return (1 - share_P) * plain_P / scaling.factor + share_P * plain_P


_SCALED: dict[type, Callable[[Tensor, Any, RopeConfig], Tensor]] = {
    LinearConfig: _linear,
    YarnConfig: _yarn,
    Llama3Config: _llama3,
}
