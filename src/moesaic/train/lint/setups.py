"""What lint asks of a set-up, and the one for a loop of one's own.

B batch, S sequence.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

Batch = Mapping[str, Any]
IGNORED = -100
MASK, LABELS = "attention_mask", "labels"


class SetUp(Protocol):
    """A model and the code that trains it.

    subject: what it is, in words. batch: one micro-batch of its own data.
    """

    model: nn.Module
    subject: str

    @property
    def batch(self) -> Any: ...

    def step(self, micro_batches: Sequence[Any]) -> float:
        """One whole training step of these micro-batches; the loss that it minimises."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """What the last step's optimizer was given, by the names of the model's weights."""
        ...

    def columns(self, batch: Any) -> int:
        """S."""
        ...

    def padded(self, batch: Any, extra: int) -> Any | None:
        """The batch with so many columns of padding after it; None where the set-up has no padding."""
        ...


class Gradients:
    """Notes what optimizers are given when they step, before they do."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.noted: dict[str, Tensor] = {}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """For the block; where no torch optimizer stepped in it, what stands in `.grad` at its end."""
        self.noted = {}
        hook = register_optimizer_step_pre_hook(lambda *_: self._note())
        try:
            yield
        finally:
            hook.remove()
        self._note()

    def _note(self) -> None:
        if self.noted:
            return
        found = ((name, weight.grad) for name, weight in self.model.named_parameters())
        self.noted = {name: gradient.detach().clone() for name, gradient in found if gradient is not None}


class OwnLoop:
    """A training loop of one's own, for lint: the model, a micro-batch, and a function that makes one step.

    batch: tensors by name, [B, S] those of tokens. step: takes a list of such micro-batches and does with them what
    training does in one optimizer step, the optimizer's included; returns the loss that was minimised. Over ranks the
    builder is called in each process, with torch.distributed (gloo) ready.
    padding: what fills up a row, by name, such as {"input_ids": 0, "attention_mask": 0, "labels": -100}; where it is
    left out, by these values for a batch with an attention_mask, and others have no padding.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        step: Callable[[list[Batch]], Tensor | float],
        *,
        padding: Mapping[str, float] | None = None,
        subject: str = "a training loop",
    ) -> None:
        self.model, self.batch, self.padding, self.subject = model, batch, padding, subject
        self._step, self._gradients = step, Gradients(model)

    def step(self, micro_batches: Sequence[Batch]) -> float:
        """See SetUp."""
        self.model.zero_grad()
        with self._gradients.noting():
            loss = self._step(list(micro_batches))
        return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)

    def gradients(self) -> dict[str, Tensor]:
        """See SetUp."""
        return self._gradients.noted

    def columns(self, batch: Batch) -> int:
        """See SetUp."""
        return columns_of(batch)

    def padded(self, batch: Batch, extra: int) -> Batch | None:
        """See SetUp."""
        return padded_with(batch, self.padding or usual_padding(batch), extra)


def columns_of(batch: Batch) -> int:
    """The width of the widest tensor of two dimensions."""
    return max(value.shape[1] for value in batch.values() if isinstance(value, Tensor) and value.dim() == 2)


def usual_padding(batch: Batch, pad_token_id: int | None = None) -> dict[str, float] | None:
    """0 in masks, no target in labels, the padding token elsewhere; None for a batch without a mask."""
    if MASK not in batch:
        return None
    return {name: {MASK: 0, LABELS: IGNORED}.get(name, pad_token_id or 0) for name in batch}


def padded_with(batch: Batch, padding: Mapping[str, float] | None, extra: int) -> Batch | None:
    """The batch with columns of these values after it; None without any."""
    if padding is None:
        return None
    width = columns_of(batch)
    return {
        name: torch.nn.functional.pad(value, (0, extra), value=padding[name])
        if name in padding and isinstance(value, Tensor) and value.shape[1:] == (width,)
        else value
        for name, value in batch.items()
    }
