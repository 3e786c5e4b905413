"""A moving average of the weights, which often evaluates better than the weights themselves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moesaic.train.precision import Weight


class WeightAverage:
    """The exponential moving average of the masters, in fp32: after t steps sum_i d^(t-i) w_i / sum_i d^(t-i).

    The division (Adam's bias correction, arXiv:1412.6980, sec. 3) keeps the initial weights out of it. Selection
    biases are no weights: the model keeps its own.
    """

    def __init__(self, weights: Sequence[Weight], decay: float) -> None:
        self.weights, self.decay = tuple(weights), decay
        self._averages = {weight.name: weight.master.clone() for weight in weights}

    def of(self, weight: Weight) -> Tensor:
        """The average of one weight: the tensor itself, fp32."""
        return self._averages[weight.name]

    def newest(self, step: int) -> float:
        """What the average takes of the weights after step `step`, counted from 0."""
        return (1 - self.decay) / (1 - self.decay ** (step + 1))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model computes with the average in this block, and with the very bits of before after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange(back=True)

    @torch.no_grad()
    def _exchange(self, *, back: bool = False) -> None:
        for weight in self.weights:
            average = self.of(weight)
            if weight.is_rounded:
                weight.parameter.copy_(weight.master if back else average)
            else:
                kept = weight.master.clone()
                weight.master.copy_(average)
                average.copy_(kept)
