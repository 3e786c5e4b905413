"""The mixture-of-experts blocks of anyone's model, by what they are made of; names play no part.

E experts, D hidden.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from moesaic.errors import ConfigError


class Block(NamedTuple):
    """A block with a router and E experts.

    router: the name of its weight in the model, [E, D], or [D, E] where `is_transposed`. experts: the prefix of the
    experts' tensors; is_stacked: whether each has a first dimension of E, or each expert is a module of its own.
    per_expert: other names of E numbers outside of the experts: biases, counters.
    """

    name: str
    module: nn.Module
    num_experts: int
    router: str
    is_transposed: bool
    experts: str
    is_stacked: bool
    per_expert: tuple[str, ...]

    def expert_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The experts' weights, by their names in the model."""
        found = model.get_submodule(self.experts).named_parameters(prefix=self.experts)
        own = {name: weight for name, weight in found if name != self.router and name not in self.per_expert}
        return {name: weight for name, weight in own.items() if not self.is_stacked or len(weight) == self.num_experts}

    def expert_of(self, name: str) -> int:
        """Whose weight this is, where each expert is a module of its own."""
        return int(name.removeprefix(f"{self.experts}.").split(".")[0])


def find_blocks(model: nn.Module) -> list[Block]:
    """All blocks, in the order of the model. Raises ConfigError for a model without."""
    found: list[Block] = []
    for name, module in model.named_modules():
        num_experts, is_stacked = _experts_in(module)
        if num_experts < 2 or any(name.startswith(f"{block.experts}.") for block in found):
            continue
        block = _block_around(model, name, num_experts, is_stacked)
        if block is not None:
            found.append(block)
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no mixture-of-experts blocks: no module with experts (stacked weights, or a "
            "ModuleList) and a router's weight of as many rows beside them; lint checks models with experts"
        )
    return found


def _experts_in(module: nn.Module) -> tuple[int, bool]:
    """(E, whether they are stacked) of a module that could hold experts, E being 0 for others."""
    stacked = [weight for weight in module.parameters(recurse=False) if weight.dim() == 3]
    if len(stacked) > 1 and len({len(weight) for weight in stacked}) == 1:
        return len(stacked[0]), True
    if isinstance(module, nn.ModuleList) and len(module) > 1:
        shapes = [[tuple(weight.shape) for weight in each.parameters()] for each in module]
        if shapes[0] and all(each == shapes[0] for each in shapes):
            return len(module), False
    return 0, False


def _block_around(model: nn.Module, experts: str, num_experts: int, is_stacked: bool) -> Block | None:
    """The nearest module around the experts, or the experts' own, that also has a router's weight."""
    for name in _around(experts, is_stacked):
        module = model.get_submodule(name)
        is_outside = (lambda key: True) if name == experts else (lambda key: not key.startswith(f"{experts}."))
        weights = [(key, weight) for key, weight in module.named_parameters(prefix=name) if is_outside(key)]
        matrices = ((key, weight.shape) for key, weight in weights if weight.dim() == 2)
        routers = [(key, shape[0] != num_experts) for key, shape in matrices if num_experts in shape]
        # Around a list of layers stand matrices of many sizes, tables among them; none with a row for each layer.
        routers = [each for each in routers if is_stacked or not each[1]]
        if routers:
            router, is_transposed = min(routers, key=lambda each: each[1])
            tensors = (
                *weights,
                *((key, tensor) for key, tensor in module.named_buffers(prefix=name) if is_outside(key)),
            )
            numbers = (key for key, each in tensors if each.shape == (num_experts,) and each.is_floating_point())
            return Block(name, module, num_experts, router, is_transposed, experts, is_stacked, tuple(numbers))
    return None


def _around(name: str, is_stacked: bool) -> Iterator[str]:
    """The module around, that of stacked experts itself (whose matrices may be their biases), the next one around."""
    parts = name.split(".")
    for up in (1, 0, 2) if is_stacked else (1, 2):
        if up <= len(parts):
            yield ".".join(parts[: len(parts) - up])
