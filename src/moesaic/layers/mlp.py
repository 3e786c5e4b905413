"""The dense feed-forward block."""

import torch
from torch import Tensor, nn

from moesaic.config import MlpConfig
from moesaic.kernels.activations import activation, gated_activation


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x)) (SwiGLU, arXiv:2002.05202, eq. 6), or without a gate down(act(up(x)))."""

    def __init__(self, config: MlpConfig, hidden_size: int) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.gate_proj = nn.Linear(hidden_size, inner, bias=config.bias) if config.gated else None
        self.up_proj = nn.Linear(hidden_size, inner, bias=config.bias)
        self.down_proj = nn.Linear(inner, hidden_size, bias=config.bias)
        self.activation = gated_activation(config.activation) if config.gated else activation(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(torch.cat([self.gate_proj(x), self.up_proj(x)], dim=-1)))
