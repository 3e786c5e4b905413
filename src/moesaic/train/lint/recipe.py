"""A moesaic recipe as a set-up: its model and its training step, on drawn tokens.

B batch, S sequence.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch.distributed as dist
from torch import Tensor

from moesaic.data.loader import Batch
from moesaic.models.build import build
from moesaic.parallel import ALONE, ProcessGroup
from moesaic.train.micro_batches import IGNORED
from moesaic.train.recipe import Recipe
from moesaic.train.step import Stepper

ROWS, COLUMNS = 4, 64
PADDING = -1


class RecipeSetUp:
    """Steps of a recipe, not compiled (compiled code passes by what lint dictates), on at most 4 rows of 64 tokens."""

    def __init__(self, recipe: Recipe) -> None:
        config = recipe.model_config(recipe.vocab_size, None)
        config.check_decoder_only("lint")
        self.config, self.document_attention = config, recipe.data.document_attention
        self.settings = dataclasses.replace(recipe.train, compile=False)
        self.model = build(config).initialize(recipe.train.seed)
        self.subject = f"a {config.family} recipe of moesaic"
        self._gradients: dict[str, Tensor] = {}
        self._stepper()  # brings the model to its precision

    @cached_property
    def batch(self) -> Batch:
        """See SetUp."""
        rows, columns = min(ROWS, self.settings.batch_size), min(COLUMNS, self.settings.sequence_length)
        rng = np.random.default_rng(self.settings.seed)
        tokens = rng.integers(self.config.vocab_size, size=(rows, columns + 1))
        return Batch(tokens[:, :-1], tokens[:, 1:], np.zeros(rows, np.int64), np.zeros((rows, columns), np.int64))

    def step(self, micro_batches: Sequence[Batch]) -> float:
        """See SetUp. Every rank counts its own micro-batches, as in training."""
        result = self._stepper().run(0, micro_batches)
        return result.loss + sum(result.coefficients[name] * value for name, value in result.balance.items())

    def gradients(self) -> dict[str, Tensor]:
        """See SetUp."""
        return self._gradients

    def columns(self, batch: Batch) -> int:
        """See SetUp."""
        return batch.inputs_BS.shape[1]

    def padded(self, batch: Batch, extra: int) -> Batch:
        """See SetUp."""

        def wider(values_BS: np.ndarray, value: int) -> np.ndarray:
            return np.pad(values_BS, ((0, 0), (0, extra)), constant_values=value)

        return batch._replace(
            inputs_BS=wider(batch.inputs_BS, 0),
            targets_BS=wider(batch.targets_BS, IGNORED),
            document_ids_BS=wider(batch.document_ids_BS, PADDING),
        )

    def _stepper(self) -> Stepper:
        """A new one for each step: what an optimizer remembers is of no other experiment."""
        ranks = ProcessGroup() if dist.is_available() and dist.is_initialized() else ALONE
        stepper = Stepper(self.model, self.settings, document_attention=self.document_attention, ranks=ranks)
        own_step = stepper.optimizer.step

        def noting(step: int, learning_rate: float, norm: Tensor) -> None:
            found = ((weight.name, stepper.optimizer.gradients.of(weight)) for weight in stepper.optimizer.weights)
            self._gradients = {name: gradient.detach().clone() for name, gradient in found if gradient is not None}
            own_step(step, learning_rate, norm)

        stepper.optimizer.step = noting
        return stepper
