"""Normalisation."""

import torch
from torch import Tensor, nn

from moesaic.config import NormConfig
from moesaic.kernels import ops


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in fp32, then times a learned weight (arXiv:1910.07467, eq. 4)."""

    def __init__(self, config: NormConfig, size: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)
