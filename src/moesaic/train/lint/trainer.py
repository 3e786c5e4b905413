"""A transformers Trainer as a set-up: its own `train()`, on micro-batches that lint chooses."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from moesaic.train.lint.setups import Batch, Gradients, columns_of, padded_with, usual_padding

QUIET = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
TALKATIVE = ("ProgressCallback", "PrinterCallback")


def is_trainer(built: Any) -> bool:
    """Whether this is a transformers Trainer, of any class below it."""
    classes = [f"{each.__module__.split('.')[0]}.{each.__name__}" for each in type(built).__mro__]
    return "transformers.Trainer" in classes


class TrainerSetUp:
    """Runs one optimizer step of the Trainer for each experiment: its loss, collator, callbacks and optimizer.

    Nothing is saved, evaluated or reported meanwhile, and gradients are not clipped.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
        self.subject = f"{type(self.model).__name__} with {type(trainer).__name__}"
        self._gradients = Gradients(self.model)
        for name, value in QUIET.items():
            setattr(trainer.args, name, type(getattr(trainer.args, name))(value))
        trainer.args.max_steps, trainer.args.max_grad_norm = 1, 0.0
        trainer.args.logging_nan_inf_filter = False  # a loss that is no number would be told as 0
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ in TALKATIVE or ".integrations." in type(callback).__module__:
                trainer.remove_callback(callback)

    @cached_property
    def batch(self) -> Batch:
        """See SetUp."""
        return dict(next(iter(self.trainer.get_train_dataloader())))

    def step(self, micro_batches: Sequence[Batch]) -> float:
        """See SetUp."""
        trainer = self.trainer
        _ = self.batch  # read before its loader is replaced
        trainer.args.gradient_accumulation_steps = len(micro_batches)
        trainer.get_train_dataloader = lambda: DataLoader(list(micro_batches), batch_size=None)  # pyright: ignore
        trainer.optimizer, trainer.lr_scheduler = None, None
        with self._gradients.noting():
            done = trainer.train()
        return float(done.training_loss)

    def gradients(self) -> dict[str, Tensor]:
        """See SetUp."""
        return self._gradients.noted

    def columns(self, batch: Batch) -> int:
        """See SetUp."""
        return columns_of(batch)

    def padded(self, batch: Batch, extra: int) -> Batch | None:
        """See SetUp. By what the set-up's own collator fills short rows with, where it does."""
        return padded_with(batch, self._padding, extra)

    @cached_property
    def _padding(self) -> Mapping[str, float] | None:
        pad_token_id = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        return _of_collator(self.trainer) or usual_padding(self.batch, pad_token_id)


def _of_collator(trainer: Any) -> dict[str, float] | None:
    """The last column of a row that is half as long as the one beside it; None for a collator that takes no such."""
    try:
        sample = dict(trainer.train_dataset[0])
        length = max(len(value) for value in sample.values() if hasattr(value, "__len__"))
        short = {k: v[: length // 2] if hasattr(v, "__len__") and len(v) == length else v for k, v in sample.items()}
        batch = trainer.data_collator([sample, short])
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, NotImplementedError):
        return None
    return {k: v[1, -1].item() for k, v in batch.items() if isinstance(v, Tensor) and v.shape == (2, length)}
