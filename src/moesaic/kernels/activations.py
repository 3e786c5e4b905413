"""Gated activations: gate and up halves in, their product out. Some by their Hugging Face name (`hidden_act`)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moesaic.config.activation import Activation, ClampedSwiglu
from moesaic.kernels import ops
from moesaic.registry import Registry

GATED_ACTIVATIONS: Registry[Callable[[Tensor], Tensor]] = Registry("activation")
GATED_ACTIVATIONS.register("silu")(ops.silu_mul)


def gated_activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The function that a configuration names. Raises ConfigError that lists the known names."""
    if isinstance(activation, ClampedSwiglu):
        return partial(clamped_swiglu, settings=activation)
    return GATED_ACTIVATIONS[activation]


def clamped_swiglu(gate_up: Tensor, settings: ClampedSwiglu) -> Tensor:
    """(up + shift) * gate * sigmoid(alpha * gate) of the clamped halves of the last dimension, in fp32 or wider."""
    wide = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    gate, up = wide.chunk(2, dim=-1)
    gate, up = gate.clamp(max=settings.limit), up.clamp(-settings.limit, settings.limit)
    return ((up + settings.shift) * gate * torch.sigmoid(settings.alpha * gate)).to(gate_up.dtype)
