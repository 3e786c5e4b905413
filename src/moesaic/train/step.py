"""One optimizer step: micro-batches forward and backward, then everything that moves once a step.

B batch, S sequence, E experts.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.data.loader import Batch
from moesaic.errors import NonFiniteError
from moesaic.layers.moe import MoeLayer
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingTape
from moesaic.routing.balancers import update_selection_bias
from moesaic.telemetry.load import StepLoad
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.train.compilation import compiled
from moesaic.train.loss import losses
from moesaic.train.optimizer import Optimizer
from moesaic.train.recipe import TrainSettings
from moesaic.train.recompute import recompute_layers
from moesaic.train.schedule import learning_rate, scheduled


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did. Losses in nats a token, before the step's update.

    balance: each balance loss, mean over layers and tokens. coefficients: what each was multiplied by.
    gradient_norm: before clipping. load: None when nobody recorded.
    """

    loss: float
    balance: dict[str, float]
    coefficients: dict[str, float]
    learning_rate: float
    selection_bias_rate: float
    gradient_norm: float
    load: StepLoad | None


class Stepper:
    """Trains a model step by step. Building it brings the model's weights to the settings' precision, in place.

    Between steps the model is an ordinary one: it can be evaluated, saved and copied. document_attention: whether
    tokens see only their own document.
    Raises MissingDependencyError when compilation is asked for and there is no compiler.
    """

    def __init__(self, model: Decoder, settings: TrainSettings, *, document_attention: bool = True) -> None:
        self.model, self.settings, self.document_attention = model, settings, document_attention
        self.optimizer = Optimizer(model, settings)
        self._hidden = compiled(model.hidden) if settings.compile else model.hidden

    def run(self, step: int, micro_batches: Sequence[Batch], recorder: LoadRecorder | None = None) -> StepResult:
        """Step `step`, counted from 0. `recorder` hears the routing and finishes its step as number `step` + 1.

        Every target counts the same, and so does every token in the balance losses, however the step is cut into
        micro-batches. (A balance loss that is not a mean over tokens, such as Switch's, is computed in each
        micro-batch: its mean over them is minimised.)
        Raises NonFiniteError before anything has moved: weights, biases, averages and optimizer are as before, and the
        gradients so far stand in `.grad` until the next step.
        """
        settings = self.settings
        self.model.train()
        totals = _Totals(self.coefficients(step))
        with self.optimizer.gradients.collecting():
            for index, (batch, share) in enumerate(zip(micro_batches, _shares(micro_batches), strict=True)):
                self._accumulate(step, index, batch, share, totals, recorder)
            norm = self.optimizer.gradients.norm()
            if not math.isfinite(float(norm)):
                raise NonFiniteError(step=step, what="gradient norm", value=float(norm))
            rate = self.learning_rate(step)
            self.optimizer.step(step, rate, norm)
        bias_rate = scheduled(settings.selection_bias_rate, step)
        self._move_selection_biases(totals.counts, bias_rate)
        return StepResult(
            loss=totals.loss,
            balance=totals.balance,
            coefficients=totals.coefficients,
            learning_rate=rate,
            selection_bias_rate=bias_rate,
            gradient_norm=float(norm),
            load=recorder.finish_step(step + 1) if recorder else None,
        )

    def learning_rate(self, step: int) -> float:
        """The rate of step `step`, counted from 0."""
        settings = self.settings
        return learning_rate(
            step,
            steps=settings.steps,
            peak=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            final_fraction=settings.final_fraction,
            schedule=settings.schedule,
            decay_fraction=settings.decay_fraction,
        )

    def coefficients(self, step: int) -> dict[str, float]:
        """The balance losses' coefficients at step `step`; none for a dense model."""
        if not self.model.config.moe_layers:
            return {}
        return {name: scheduled(value, step) for name, value in self.settings.balance_losses}

    def _accumulate(
        self,
        step: int,
        index: int,
        batch: Batch,
        share: "_Share",
        totals: "_Totals",
        recorder: LoadRecorder | None,
    ) -> None:
        inputs_BS, targets_BS = torch.from_numpy(batch.inputs_BS), torch.from_numpy(batch.targets_BS)
        tape = RoutingTape()
        with self._recomputing():
            parts = losses(
                self.model,
                inputs_BS,
                targets_BS,
                tuple(totals.coefficients.items()),
                tape,
                document_ids_BS=torch.from_numpy(batch.document_ids_BS) if self.document_attention else None,
                hidden=self._hidden,
            )
            total = parts.cross_entropy * share.targets + parts.penalty * share.tokens
            if not math.isfinite(total.item()):
                raise NonFiniteError(step=step, what="loss", value=total.item(), micro_batch=index)
            total.backward()
        totals.loss += parts.cross_entropy.item() * share.targets
        for name, value in parts.balance.items():
            totals.balance[name] += value.item() * share.tokens
        if recorder and recorder.num_domains:
            recorder.set_domains(torch.from_numpy(batch.domain_ids_B).repeat_interleave(inputs_BS.shape[1]))
        for layer, decision in tape.decisions.items():
            totals.count(layer, decision.rows.counts_E)
            if recorder:
                recorder.hear(layer, decision)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        with recompute_layers(self.model) if self.settings.recompute == "layers" else nullcontext():
            yield

    def _move_selection_biases(self, counts: dict[int, Tensor], rate: float) -> None:
        for module in self.model.modules():
            if isinstance(module, MoeLayer) and module.router.selection_bias is not None:
                update_selection_bias(module.router.selection_bias, counts[module.layer], rate)


@dataclass(frozen=True)
class _Share:
    """The part of a step's targets (those that count) and of its tokens that are in one micro-batch."""

    targets: float
    tokens: float


def _shares(micro_batches: Sequence[Batch]) -> list[_Share]:
    targets = [int((batch.targets_BS >= 0).sum()) for batch in micro_batches]
    tokens = [batch.inputs_BS.size for batch in micro_batches]
    return [_Share(t / max(1, sum(targets)), n / sum(tokens)) for t, n in zip(targets, tokens, strict=True)]


class _Totals:
    """What is added up over a step's micro-batches."""

    def __init__(self, coefficients: dict[str, float]) -> None:
        self.coefficients = coefficients
        self.loss = 0.0
        self.balance = dict.fromkeys(coefficients, 0.0)
        self.counts: dict[int, Tensor] = {}

    def count(self, layer: int, counts_E: Tensor) -> None:
        self.counts[layer] = self.counts[layer] + counts_E if layer in self.counts else counts_E
