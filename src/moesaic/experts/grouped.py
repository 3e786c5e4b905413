"""Experts as stacked matrices, multiplied group by group.

R rows sorted by expert, E experts, F expert inner, D hidden.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moesaic.config import MoeConfig, SoftMoeConfig
from moesaic.experts import dispatch
from moesaic.kernels import ops
from moesaic.kernels.activations import activation, gated_activation
from moesaic.routing import Rows


class GroupedExperts(nn.Module):
    """E gated feed-forward blocks: `gate_up` [E, 2F, D] (gate rows, then up rows) and `down` [E, D, F].

    Where the configuration asks for them with biases `gate_up_bias` [E, 2F] and `down_bias` [E, D]; blocks without a
    gate have `up` [E, F, D] and `up_bias` [E, F] in their place.
    """

    gate_up: nn.Parameter
    gate_up_bias: nn.Parameter | None
    up: nn.Parameter
    up_bias: nn.Parameter | None
    activation: Callable[[Tensor], Tensor]

    def __init__(self, config: MoeConfig | SoftMoeConfig, hidden_size: int) -> None:
        super().__init__()
        num_experts, inner = config.num_experts, config.intermediate_size
        is_moe = isinstance(config, MoeConfig)
        has_bias, gated = is_moe and config.bias, not is_moe or config.gated
        self.gated = gated
        self.into_name, width = ("gate_up", 2 * inner) if gated else ("up", inner)
        self.register_parameter(self.into_name, nn.Parameter(torch.empty(num_experts, width, hidden_size)))
        bias = nn.Parameter(torch.empty(num_experts, width)) if has_bias else None
        self.register_parameter(f"{self.into_name}_bias", bias)
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, inner))
        self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size)) if has_bias else None
        self.activation = gated_activation(config.activation) if gated else activation(config.activation)
        self.dropout = config.expert_dropout
        self.output_masking = config.output_masking if is_moe else 0.0

    def forward(self, x_RD: Tensor, expert_offsets: Tensor) -> Tensor:
        """out_RD: each row through its own expert, unweighted."""
        inner_RF = self._inner(x_RD, expert_offsets)
        if self.dropout and self.training:
            inner_RF = torch.nn.functional.dropout(inner_RF, self.dropout)
        out_RD = _plus(ops.grouped_linear(inner_RF, self.down, expert_offsets), self.down_bias, expert_offsets)
        return self._masked(out_RD) if self.output_masking else out_RD

    @property
    def into(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """What leads from D to F, and its bias: `gate_up`, or `up` of blocks without a gate."""
        return getattr(self, self.into_name), getattr(self, f"{self.into_name}_bias")

    def _inner(self, x_RD: Tensor, expert_offsets: Tensor) -> Tensor:
        weight, bias = self.into
        if bias is None and self.activation is ops.silu_mul:
            return ops.grouped_gated(x_RD, weight, expert_offsets)
        return self.activation(_plus(ops.grouped_linear(x_RD, weight, expert_offsets), bias, expert_offsets))

    def _masked(self, out_RD: Tensor) -> Tensor:
        """While training without the outputs of some rows, otherwise as large as they then are in the mean."""
        if not self.training:
            return out_RD * (1 - self.output_masking)
        return out_RD * (torch.rand(len(out_RD), 1, device=out_RD.device) >= self.output_masking)

    def compute(self, x_TD: Tensor, rows: Rows) -> Tensor:
        """y_TD: every token through its experts, weighted and summed."""
        return dispatch.compute(self, x_TD, rows)


def _plus(y_RO: Tensor, bias_EO: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """Each row with its own expert's bias."""
    if bias_EO is None:
        return y_RO
    counts_E = expert_offsets.diff().to(y_RO.device)
    return y_RO + bias_EO.repeat_interleave(counts_E, dim=0, output_size=len(y_RO))
