"""Experts as stacked matrices, multiplied group by group.

R rows sorted by expert, E experts, F expert inner, D hidden.
"""

import torch
from torch import Tensor, nn

from moesaic.config import MoeConfig, SoftMoeConfig
from moesaic.experts import dispatch
from moesaic.kernels import ops
from moesaic.kernels.activations import GATED_ACTIVATIONS
from moesaic.routing import Rows


class GroupedExperts(nn.Module):
    """E gated feed-forward blocks: `gate_up` [E, 2F, D] (gate rows, then up rows) and `down` [E, D, F]."""

    def __init__(self, config: MoeConfig | SoftMoeConfig, hidden_size: int) -> None:
        super().__init__()
        num_experts, inner = config.num_experts, config.intermediate_size
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, inner))
        self.activation = GATED_ACTIVATIONS[config.activation]
        self.dropout = config.expert_dropout

    def forward(self, x_RD: Tensor, expert_offsets: Tensor) -> Tensor:
        """out_RD: each row through its own expert, unweighted."""
        if self.activation is ops.silu_mul:
            inner_RF = ops.grouped_gated(x_RD, self.gate_up, expert_offsets)
        else:
            inner_RF = self.activation(ops.grouped_linear(x_RD, self.gate_up, expert_offsets))
        if self.dropout and self.training:
            inner_RF = torch.nn.functional.dropout(inner_RF, self.dropout)
        return ops.grouped_linear(inner_RF, self.down, expert_offsets)

    def compute(self, x_TD: Tensor, rows: Rows) -> Tensor:
        """y_TD: every token through its experts, weighted and summed."""
        return dispatch.compute(self, x_TD, rows)
