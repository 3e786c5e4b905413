"""Activations, some by their Hugging Face name (`hidden_act`). Gated ones: gate and up halves in, their product out."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moesaic.config.activation import Activation, ClampedSwiglu
from moesaic.kernels import ops
from moesaic.registry import Registry

GATED_ACTIVATIONS: Registry[Callable[[Tensor], Tensor]] = Registry("activation")
GATED_ACTIVATIONS.register("silu")(ops.silu_mul)
ACTIVATIONS: Registry[Callable[[Tensor], Tensor]] = Registry("activation without a gate")
ACTIVATIONS.register("relu")(torch.relu)
ACTIVATIONS.register("silu")(torch.nn.functional.silu)
ACTIVATIONS.register("gelu")(torch.nn.functional.gelu)
ACTIVATIONS.register("gelu_new")(partial(torch.nn.functional.gelu, approximate="tanh"))


def activation(name: Activation) -> Callable[[Tensor], Tensor]:
    """The function without a gate that a configuration names. Raises ConfigError that lists the known names."""
    return ACTIVATIONS[str(name)]


@GATED_ACTIVATIONS.register("gelu_new")
def gelu_mul(gate_up: Tensor) -> Tensor:
    """up * gelu(gate) of the halves of the last dimension, the GELU by its tanh formula (GEGLU, arXiv:2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


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
