"""The optimizer: clips, moves every weight by its rule, rounds it for the model and averages it, in one pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from moesaic.errors import CheckpointError, ConfigError
from moesaic.kernels import ops
from moesaic.kernels.adam import AdamStep
from moesaic.models.build import Model
from moesaic.train.ema import WeightAverage
from moesaic.train.gradients import Gradients
from moesaic.train.muon import Muon
from moesaic.train.precision import Copies, Weight, trained_weights
from moesaic.train.recipe import TrainSettings


class Rule(Protocol):
    """How one tensor moves. `state` is everything that the next update needs, by name."""

    state: dict[str, Tensor]

    def update(self, gradient: Tensor, learning_rate: float, clip: float, copies: Copies) -> None:
        """Multiply the gradient by `clip`, move the tensor by it, and bring its copies up to date.

        The gradient's memory may be used up.
        """
        ...


class AdamW:
    """AdamW (arXiv:1711.05101) of one tensor."""

    def __init__(self, master: Tensor, *, betas: tuple[float, float], weight_decay: float) -> None:
        self.master, self.betas, self.weight_decay = master, betas, weight_decay
        self.state = {
            "step": torch.zeros((), dtype=torch.float32),  # on the CPU, where it is read
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }

    def update(self, gradient: Tensor, learning_rate: float, clip: float, copies: Copies) -> None:
        """See Rule."""
        count, first, second = self.state.values()
        count += 1
        step = AdamStep.number(
            int(count),
            learning_rate=learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            clip=clip,
            newest=copies.newest,
        )
        ops.adamw_(self.master, gradient, (first, second), step, rounded=copies.rounded, average=copies.average)


class Optimizer:
    """Everything that training keeps of a model: masters, gradients, the state of each weight's rule, the average.

    Building it brings the model's weights to the settings' precision, in place.
    """

    def __init__(self, model: Model, settings: TrainSettings) -> None:
        self.settings = settings
        self.weights = trained_weights(model, settings.precision)
        # A compiled backward pass knows nothing of buffers: ordinary gradients there.
        in_place = () if settings.compile else written_in_place(model)
        self.gradients = Gradients(self.weights, in_place)
        self.rules = {weight.name: _rule(model, weight, settings) for weight in self.weights}
        self.average = WeightAverage(self.weights, settings.ema_decay) if settings.ema_decay else None

    @torch.no_grad()
    def step(self, step: int, learning_rate: float, norm: Tensor) -> None:
        """Move all weights by the collected gradients, whose joint norm is `norm`; `step` counts from 0."""
        clip = float((self.settings.clip_norm / (norm + 1e-6)).clamp(max=1.0))  # as torch's clip_grad_norm_ has it
        for weight in self.weights:
            gradient, copies = self.gradients.of(weight), self._copies(weight, step)
            if gradient is not None:
                self.rules[weight.name].update(gradient, learning_rate, clip, copies)
            else:
                copies.follow(weight.master)

    def _copies(self, weight: Weight, step: int) -> Copies:
        rounded = weight.parameter.detach() if weight.is_rounded else None
        if self.average is None:
            return Copies(rounded)
        return Copies(rounded, self.average.of(weight), self.average.newest(step))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model computes with the average of its weights in this block. Raises ConfigError when none is kept."""
        if self.average is None:
            raise ConfigError("train.ema_decay=0 keeps no average of the weights; set it, for example to 0.999")
        with self.average.in_model():
            yield

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor kept from step to step, as (weight's name + "|" + its name there, tensor itself)."""
        for weight in self.weights:
            if weight.is_rounded:
                yield f"{weight.name}|master", weight.master
            for key, tensor in self.rules[weight.name].state.items():
                yield f"{weight.name}|{key}", tensor
            if self.average:
                yield f"{weight.name}|ema", self.average.of(weight)


def written_in_place(model: Model) -> list[torch.nn.Parameter]:
    """The parameters whose gradient is written straight into a buffer: the experts' and the head's."""
    roles = {spec.name: spec.role for spec in model.config.tensors()}
    head = model.head_weight
    return [parameter for name, parameter in model.named_parameters() if roles[name] == "experts" or parameter is head]


def _rule(model: Model, weight: Weight, settings: TrainSettings) -> Rule:
    """Muon for the matrices of layers; AdamW for the rest. Matrices decay; norms, biases and embeddings do not.

    Relative biases are biases, though kept as a table of them: nothing is multiplied by it.
    """
    is_bias = weight.name.endswith(("_bias", ".relative_bias.weight"))
    is_matrix = weight.master.dim() >= 2 and weight.role != "embedding" and not is_bias
    weight_decay = settings.weight_decay if is_matrix else 0.0
    if settings.optimizer == "muon" and is_matrix and weight.role not in ("head", "router"):
        return Muon(
            weight.master,
            matrix_shape=_matrix_shape(weight),
            momentum=settings.muon_momentum,
            weight_decay=weight_decay,
        )
    return AdamW(weight.master, betas=settings.betas, weight_decay=weight_decay)


def _matrix_shape(weight: Weight) -> tuple[int, int]:
    """The shape of one matrix among those that a tensor holds: experts keep gate and up in one, [E, 2F, D]."""
    rows, columns = weight.master.shape[-2:]
    return (rows // 2, columns) if weight.name.endswith(".gate_up") else (rows, columns)


def named_state(model: Model, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor the optimizer keeps, as (parameter name + "|" + its name there, tensor itself, not a copy)."""
    return optimizer.state()


@torch.no_grad()
def restore_state(model: Model, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `named_state`, in place; rounded weights are made from their masters again.

    Raises CheckpointError when these are not the tensors that this optimizer keeps; then none has changed.
    """
    kept = dict(named_state(model, optimizer))
    if different := sorted(kept.keys() ^ tensors.keys()):
        where = "is missing" if different[0] in kept else "is not kept by this recipe"
        raise CheckpointError(
            f"the checkpoint's optimizer state does not fit: {different[0]} {where} ({len(different)} such); "
            "resume with the recipe that wrote it (optimizer, precision, ema_decay)"
        )
    for name, tensor in kept.items():
        if tensor.shape != tensors[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensors[name].shape)} in the checkpoint and {tuple(tensor.shape)} in this "
                "model; resume with the recipe that wrote it"
            )
    for name, tensor in kept.items():
        tensor.copy_(tensors[name])
    for weight in optimizer.weights:
        weight.publish()
