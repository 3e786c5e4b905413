"""What a model computes with and what is trained: the same fp32 tensors, or fp32 masters beside bf16 weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.models.build import Model
from moesaic.tensor_spec import Role

Precision = Literal["fp32", "bf16"]

# The router layer multiplies in fp32 whatever its weight's dtype is, and the weight is tiny: rounding it would cost
# nothing less and let masters and weights choose different experts. Norm weights do become bf16: the kernel that does
# the norm's arithmetic in fp32 takes rows and weight of one dtype, and the master keeps what rounding hides.
# What residual streams are mixed by is fp32 in every model.
_ALWAYS_FP32: tuple[Role, ...] = ("router", "residual")


@dataclass(frozen=True, eq=False)
class Weight:
    """One trained tensor. `parameter` is what the model multiplies with, `master` what the optimizer moves, in fp32.

    Where the model computes with it in fp32 they share their memory.
    """

    name: str
    role: Role
    parameter: nn.Parameter
    master: Tensor

    @property
    def is_rounded(self) -> bool:
        """Whether the model computes with a rounded copy."""
        return self.parameter.dtype != self.master.dtype

    @torch.no_grad()
    def publish(self) -> None:
        """Round the master into the model's weight."""
        if self.is_rounded:
            self.parameter.copy_(self.master)


@dataclass(frozen=True)
class Copies:
    """What follows a master that moves: the rounded weight and the average, where they are kept.

    newest: what the average takes of the moved master.
    """

    rounded: Tensor | None = None
    average: Tensor | None = None
    newest: float = 1.0

    def follow(self, master: Tensor, part: slice = slice(None)) -> None:
        """Bring them up to date: all of them, or a part of their flat elements."""
        moved = master.view(-1)[part]
        if self.rounded is not None:
            self.rounded.view(-1)[part].copy_(moved)
        if self.average is not None:
            self.average.view(-1)[part].lerp_(moved, self.newest)


def trained_weights(model: Model, precision: Precision) -> tuple[Weight, ...]:
    """The model's weights, brought to `precision` in place; masters begin as the weights were before rounding.

    Buffers (selection biases) stay as they are.
    """
    return tuple(_trained_weights(model, precision))


def _trained_weights(model: Model, precision: Precision) -> Iterator[Weight]:
    roles: dict[str, Role] = {spec.name: spec.role for spec in model.config.tensors()}
    for name, parameter in model.named_parameters():
        role = roles[name]
        master = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32)).contiguous()
        rounds = precision == "bf16" and role not in _ALWAYS_FP32
        parameter.data = master.bfloat16() if rounds else master
        yield Weight(name, role, parameter, master)
