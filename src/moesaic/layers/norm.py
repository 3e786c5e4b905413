"""Normalisation."""

import torch
from torch import Tensor, nn

from moesaic.config import NormConfig
from moesaic.kernels import ops


def norm(config: NormConfig, size: int) -> "RmsNorm | LayerNorm":
    """The norm that a configuration describes, over vectors of `size`."""
    return LayerNorm(config, size) if config.kind == "layer" else RmsNorm(config, size)


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in fp32, then times a learned weight (arXiv:1910.07467, eq. 4)."""

    def __init__(self, config: NormConfig, size: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps), then times a learned weight, plus a bias (arXiv:1607.06450, eq. 4)."""

    def __init__(self, config: NormConfig, size: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def unit_rms(x: Tensor, config: NormConfig) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in fp32, without a weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + config.eps)).to(x.dtype)
