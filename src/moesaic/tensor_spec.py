"""What a model's tensors are, before they exist."""

import math
from typing import Literal, NamedTuple, get_args

Role = Literal["embedding", "attention", "norm", "residual", "router", "experts", "shared_experts", "mlp", "head"]
ROLES: tuple[Role, ...] = get_args(Role)


class TensorSpec(NamedTuple):
    """A tensor of the model: its name in our modules, its shape, what it is for.

    `top_k_of` is (k, E) for expert tensors, of which k out of E slices along dim 0 are used for a token.
    `is_parameter` is false for buffers that no gradient reaches (selection biases); they are saved but not counted.
    `dtype` is that of a tensor which never takes the model's. `start` is the value that a new one is filled with; None
    where it is drawn, or follows from its role. `gain` multiplies the standard deviation of what is drawn.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    top_k_of: tuple[int, int] | None = None
    is_parameter: bool = True
    dtype: Literal["float32", "int32"] | None = None
    start: float | None = None
    gain: float = 1.0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def active_numel(self) -> int:
        """Elements used for one token."""
        if self.top_k_of is None:
            return self.numel
        top_k, num_experts = self.top_k_of
        return self.numel // num_experts * top_k
