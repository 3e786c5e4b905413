"""Experts as stacked matrices, multiplied group by group.

R rows sorted by expert, E experts, F expert inner, D hidden.
"""

import torch
from torch import Tensor, nn

from moesaic.config import MoeConfig, SoftMoeConfig
from moesaic.experts import dispatch
from moesaic.kernels import ops
from moesaic.kernels.activations import gated_activation
from moesaic.routing import Rows


class GroupedExperts(nn.Module):
    """E gated feed-forward blocks: `gate_up` [E, 2F, D] (gate rows, then up rows) and `down` [E, D, F].

    Where the configuration asks for them with biases `gate_up_bias` [E, 2F] and `down_bias` [E, D].
    """

    def __init__(self, config: MoeConfig | SoftMoeConfig, hidden_size: int) -> None:
        super().__init__()
        num_experts, inner = config.num_experts, config.intermediate_size
        has_bias = isinstance(config, MoeConfig) and config.bias
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden_size))
        self.gate_up_bias = nn.Parameter(torch.empty(num_experts, 2 * inner)) if has_bias else None
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, inner))
        self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size)) if has_bias else None
        self.activation = gated_activation(config.activation)
        self.dropout = config.expert_dropout

    def forward(self, x_RD: Tensor, expert_offsets: Tensor) -> Tensor:
        """out_RD: each row through its own expert, unweighted."""
        inner_RF = self._inner(x_RD, expert_offsets)
        if self.dropout and self.training:
            inner_RF = torch.nn.functional.dropout(inner_RF, self.dropout)
        return _plus(ops.grouped_linear(inner_RF, self.down, expert_offsets), self.down_bias, expert_offsets)

    def _inner(self, x_RD: Tensor, expert_offsets: Tensor) -> Tensor:
        if self.gate_up_bias is None and self.activation is ops.silu_mul:
            return ops.grouped_gated(x_RD, self.gate_up, expert_offsets)
        gate_up_RG = ops.grouped_linear(x_RD, self.gate_up, expert_offsets)
        return self.activation(_plus(gate_up_RG, self.gate_up_bias, expert_offsets))

    def compute(self, x_TD: Tensor, rows: Rows) -> Tensor:
        """y_TD: every token through its experts, weighted and summed."""
        return dispatch.compute(self, x_TD, rows)


def _plus(y_RO: Tensor, bias_EO: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """Each row with its own expert's bias."""
    if bias_EO is None:
        return y_RO
    counts_E = expert_offsets.diff().to(y_RO.device)
    return y_RO + bias_EO.repeat_interleave(counts_E, dim=0, output_size=len(y_RO))
