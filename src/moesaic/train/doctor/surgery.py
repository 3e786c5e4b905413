"""Rows of a model that change together with what the optimizer keeps of them, and can be put back to the bit.

E experts, D hidden.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.models.build import Model
from moesaic.telemetry.probe import routed_layers
from moesaic.train.optimizer import Optimizer
from moesaic.train.precision import Weight

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
ROUTER_PARTS = ("weight", "noise_weight", "bias")
RUNNING = ("running_mean", "running_var")
"""Of a router's logits, where these are normalised over the batch."""


@dataclass(frozen=True)
class Kept:
    """Rows as they were: the tensor's name, which rows, and their values."""

    name: str
    rows: list[int]
    values: Tensor


class Theatre:
    """A layer under the knife. Rows are expert numbers: the first dimension of every tensor it touches.

    Every change writes masters, so that rounded weights follow; averages (EMA) become what the weights become, since
    an average of two different experts is none. `kept` has what was there before, each row once.
    """

    def __init__(self, model: Model, optimizer: Optimizer, layer: int) -> None:
        self.module = routed_layers(model)[layer]
        self.prefix = next(name for name, module in model.named_modules() if module is self.module)
        self.optimizer = optimizer
        self._weights = {weight.name: weight for weight in optimizer.weights if weight.name.startswith(self.prefix)}
        self._buffers = dict(model.named_buffers())
        self.kept: list[Kept] = []

    @property
    def expert_weights(self) -> list[Weight]:
        """Everything that routed experts are made of."""
        start = f"{self.prefix}.experts."
        return [weight for name, weight in self._weights.items() if name.startswith(start)]

    def router_weight(self, part: str) -> Weight | None:
        """One learned part of the router."""
        return self._weights.get(f"{self.prefix}.router.{part}")

    def router_buffer(self, part: str) -> Tensor | None:
        """One part of the router that no gradient reaches."""
        return self._buffers.get(f"{self.prefix}.router.{part}")

    @torch.no_grad()
    def write(self, weight: Weight, row: int, values: Tensor, *, state_of: int | None = None) -> None:
        """Make `values` the row of a weight. Its first moments become 0: they are of another function. Its second
        moments become those of row `state_of`, whose gradients are of that size, or the mean of all other rows': zeros
        beside a step count that others share would make the first updates too large."""
        self._keep(weight.name, row)
        weight.master[row] = values.to(weight.master)
        weight.publish()
        for name, tensor in self._row_states(weight):
            if name in FIRST_MOMENTS:
                tensor[row] = 0
            elif name == "ema":
                tensor[row] = weight.master[row]
            else:
                tensor[row] = tensor[state_of] if state_of is not None else _mean_of_others(tensor, row)

    @torch.no_grad()
    def write_buffer(self, part: str, row: int, value: float | Tensor) -> None:
        """Make `value` the row of a router's buffer."""
        buffer = self.router_buffer(part)
        assert buffer is not None
        self._keep(f"{self.prefix}.router.{part}", row)
        buffer[row] = value

    def _keep(self, name: str, row: int) -> None:
        for key, tensor in tensors_of(self.optimizer, self._buffers, name):
            if not any(kept.name == key and row in kept.rows for kept in self.kept):
                self.kept.append(Kept(key, [row], tensor[row : row + 1].clone()))

    def _row_states(self, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in tensors_of(self.optimizer, self._buffers, weight.name):
            state = key.partition("|")[2]
            if state != "master":
                yield state, tensor


def _mean_of_others(tensor: Tensor, row: int) -> Tensor:
    others = [each for each in range(len(tensor)) if each != row]
    return tensor[others].mean(0) if others else torch.zeros_like(tensor[row])


def tensors_of(optimizer: Optimizer, buffers: Mapping[str, Tensor], name: str) -> Iterator[tuple[str, Tensor]]:
    """What belongs to a tensor row by row: a weight's master, moments and average; or a buffer."""
    if name in buffers:
        yield name, buffers[name]
        return
    weight = next(each for each in optimizer.weights if each.name == name)
    yield f"{name}|master", weight.master
    for key, tensor in optimizer.rules[name].state.items():
        if tensor.shape == weight.master.shape:
            yield f"{name}|{key}", tensor
    if optimizer.average is not None:
        yield f"{name}|ema", optimizer.average.of(weight)


@torch.no_grad()
def put_back(model: Model, optimizer: Optimizer, kept: list[Kept]) -> None:
    """Undo changes of rows: to the bit if nothing has moved since, else these rows alone."""
    buffers = dict(model.named_buffers())
    names = list(dict.fromkeys(each.name.partition("|")[0] for each in kept))
    tensors = {key: tensor for name in names for key, tensor in tensors_of(optimizer, buffers, name)}
    for each in kept:
        tensors[each.name][each.rows] = each.values.to(tensors[each.name])
    for weight in optimizer.weights:
        if weight.name in names:
            weight.publish()
