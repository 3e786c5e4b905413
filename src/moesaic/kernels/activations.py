"""Gated activations by their Hugging Face name (`hidden_act`): gate and up halves in, their product out."""

from collections.abc import Callable

from torch import Tensor

from moesaic.kernels import ops
from moesaic.registry import Registry

GATED_ACTIVATIONS: Registry[Callable[[Tensor], Tensor]] = Registry("activation")
GATED_ACTIVATIONS.register("silu")(ops.silu_mul)
