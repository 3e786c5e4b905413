"""Experts, and single matrices, whose weights are packed for reading: for inference only.

R rows sorted by expert, E experts, F expert inner, D hidden, I inputs, O outputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.experts import dispatch
from moesaic.kernels import backend
from moesaic.kernels.blocks import PackedMatrices, PackedShape
from moesaic.routing import Rows


class PackedWeight(nn.Module):
    """Packed matrices. They move with their model from device to device, and are no part of its state dict."""

    data: Tensor

    def __init__(self, packed: PackedMatrices) -> None:
        super().__init__()
        self.shape: PackedShape = packed.shape
        self.register_buffer("data", packed.data, persistent=False)

    def forward(self, x_RI: Tensor, expert_offsets: Tensor) -> Tensor:
        """y_RO of the rows' dtype: each row times its own expert's matrix. Rows with gradients are a ConfigError."""
        if torch.is_grad_enabled() and x_RI.requires_grad:
            raise ConfigError("packed weights do not train; load the model without bits")
        packed = PackedMatrices(self.data, self.shape)
        return backend.kernels.packed_linear(x_RI.float(), packed, expert_offsets).to(x_RI.dtype)


class PackedLinear(nn.Module):
    """y = x W^T + b of one packed matrix."""

    def __init__(self, packed: PackedMatrices, bias: Tensor | None = None) -> None:
        super().__init__()
        self.packed = PackedWeight(packed)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., O] of [..., I]."""
        x_RI = x.reshape(-1, x.shape[-1])
        y = self.packed(x_RI, torch.tensor([0, len(x_RI)])).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class PackedExperts(nn.Module):
    """Stands in for GroupedExperts: `into` [E, 2F, D] paired (or [E, F, D] without a gate), `down` [E, D, F]."""

    def __init__(
        self,
        into: PackedMatrices,
        down: PackedMatrices,
        activation: Callable[[Tensor], Tensor],
        biases: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.into, self.down = PackedWeight(into), PackedWeight(down)
        self.activation = activation
        self.into_bias, self.down_bias = (
            (None, None) if biases is None else (nn.Parameter(bias, requires_grad=False) for bias in biases)
        )

    def forward(self, x_RD: Tensor, expert_offsets: Tensor) -> Tensor:
        """out_RD: each row through its own expert, unweighted."""
        inner = self._plus(self.into(x_RD, expert_offsets), self.into_bias, expert_offsets)
        return self._plus(self.down(self.activation(inner), expert_offsets), self.down_bias, expert_offsets)

    def compute(self, x_TD: Tensor, rows: Rows) -> Tensor:
        """y_TD: every token through its experts, weighted and summed."""
        return dispatch.compute(self, x_TD, rows)

    @staticmethod
    def _plus(y_RO: Tensor, bias_EO: Tensor | None, expert_offsets: Tensor) -> Tensor:
        if bias_EO is None:
            return y_RO
        return y_RO + bias_EO.repeat_interleave(expert_offsets.diff().to(y_RO.device), dim=0, output_size=len(y_RO))
