"""One optimizer step: micro-batches forward and backward, then everything that moves once a step.

B batch, S sequence, E experts, P ranks.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import NonFiniteError
from moesaic.models.build import Model
from moesaic.models.decoder import Decoder
from moesaic.parallel import ALONE, Ranks
from moesaic.routing import RoutingTape
from moesaic.routing.balancers import BALANCE_LOSSES, refuse_unfit
from moesaic.telemetry.load import StepLoad, sum_loads
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.train.balance import move_balance, running_statistics, statistics_kept_on_failure, with_own
from moesaic.train.compilation import compiled
from moesaic.train.counts import StepCounts
from moesaic.train.further_tokens import hidden_and_targets
from moesaic.train.loss import losses, routers_of
from moesaic.train.micro_batches import AnyBatch, Share, shares_of, tensors_of
from moesaic.train.optimizer import Optimizer
from moesaic.train.over_ranks import average_statistics, sum_gradients
from moesaic.train.random_state import undisturbed
from moesaic.train.recipe import TrainSettings
from moesaic.train.recompute import recompute_layers
from moesaic.train.schedule import learning_rate, scheduled


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did, over all ranks. Losses in nats a token, before the step's update.

    balance: each balance loss, mean over layers and tokens. coefficients: what each was multiplied by (times the mean
    of the layers' own coefficients, for losses that have these).
    mtp: of each layer that predicts further tokens, where they were trained (see `train.loss.Losses`).
    gradient_norm: before clipping. load: None when nobody recorded. num_tokens: read by the model, sources included.
    first_pass_s: how long it took to count the whole step's choices beforehand; 0 when no loss asked for them.
    """

    loss: float
    balance: dict[str, float]
    coefficients: dict[str, float]
    learning_rate: float
    selection_bias_rate: float
    gradient_norm: float
    load: StepLoad | None
    num_tokens: int
    mtp: tuple[float, ...] = ()
    first_pass_s: float = 0.0


class Stepper:
    """Trains a model step by step. Building it brings the model's weights to the settings' precision, in place.

    It computes where the model is. Between steps the model is an ordinary one: it can be evaluated, saved and copied.
    document_attention: whether tokens see only their own document. ranks: the processes that share each step, all with
    the same weights at first and then forever.
    Raises MissingDependencyError when compilation is asked for and there is no compiler, ConfigError for a balance
    loss that the model's routers cannot have.
    """

    def __init__(
        self, model: Model, settings: TrainSettings, *, document_attention: bool = True, ranks: Ranks = ALONE
    ) -> None:
        self.model, self.settings, self.document_attention, self.ranks = model, settings, document_attention, ranks
        refuse_unfit((name for name, _ in settings.balance_losses), list(routers_of(model.config).values()))
        self.optimizer = Optimizer(model, settings)
        self.prescribed: dict[str, float] = {}  # what a doctor adds to the balance losses' coefficients
        self._carried = compiled(model.carried) if settings.compile else model.carried

    def run(self, step: int, micro_batches: Sequence[AnyBatch], recorder: LoadRecorder | None = None) -> StepResult:
        """Step `step`, counted from 0. `recorder` hears the routing and finishes its step as number `step` + 1.

        Every target counts the same, and so does every token in the balance losses, however the step is cut into
        micro-batches and over ranks; padding counts nowhere. (A balance loss of scope "micro-batch", such as Switch's,
        is computed in each: its mean over them, weighted by tokens, is minimised.)
        Each rank gives as many micro-batches as the others (ConfigError otherwise), and all of them a recorder or none.
        Raises NonFiniteError, on all ranks, before anything has moved: weights, biases, averages and optimizer are as
        before, and the gradients so far stand in `.grad` until the next step.
        """
        self.model.train()
        shares = shares_of(micro_batches, self.ranks)
        whole, first_pass_s = self._first_pass(step, micro_batches)
        totals = _Totals(self.coefficients(step), StepCounts(self.ranks, whole), self._num_further(step))
        with statistics_kept_on_failure(self.model), self.optimizer.gradients.collecting():
            for index, (batch, share) in enumerate(zip(micro_batches, shares, strict=True)):
                self._accumulate(step, index, batch, share, totals, recorder)
            sum_gradients(self.optimizer.gradients, self.ranks)
            norm = self.optimizer.gradients.norm()
            if not math.isfinite(float(norm)):
                raise NonFiniteError(step=step, what="gradient norm", value=float(norm))
            rate = self.learning_rate(step)
            self.optimizer.step(step, rate, norm)
        totals.sum_over(self.ranks)
        average_statistics(running_statistics(self.model), self.ranks)
        coefficients = with_own(totals.coefficients, self.model)
        bias_rate = scheduled(self.settings.selection_bias_rate, step)
        move_balance(self.model, self.settings, totals.counts, bias_rate)
        return StepResult(
            loss=totals.loss,
            balance=totals.balance,
            coefficients=coefficients,
            learning_rate=rate,
            selection_bias_rate=bias_rate,
            gradient_norm=float(norm),
            load=self._load(recorder, step + 1),
            num_tokens=shares[0].step_tokens,
            mtp=tuple(totals.mtp),
            first_pass_s=first_pass_s,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embedding.weight.device

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
        """The balance losses' coefficients at step `step`, with what is prescribed; none for a dense model."""
        if not routers_of(self.model.config):
            return {}
        found = {name: scheduled(value, step) for name, value in self.settings.balance_losses}
        return found | {name: found.get(name, 0.0) + value for name, value in self.prescribed.items()}

    def _num_further(self, step: int) -> int:
        """How many layers that predict further tokens take part."""
        return len(self.model.mtp) if scheduled(self.settings.mtp_coefficient, step) else 0

    def _accumulate(
        self,
        step: int,
        index: int,
        batch: AnyBatch,
        share: Share,
        totals: "_Totals",
        recorder: LoadRecorder | None,
    ) -> None:
        tensors = tensors_of(batch, self.document_attention, self.device)
        tape = RoutingTape()
        with self._recomputing():
            parts = losses(
                self.model,
                tensors.inputs_BS,
                tensors.targets_BS,
                tuple(totals.coefficients.items()),
                tape,
                mask_BS=tensors.mask_BS,
                document_ids_BS=tensors.document_ids_BS,
                source=tensors.source,
                mtp_coefficient=scheduled(self.settings.mtp_coefficient, step),
                carried=self._carried,
                counts=totals.counts,
                shares=share.by_layer(self.model.config),
            )
            total = parts.prediction * share.targets + parts.penalty
            # Over ranks, so that all of them stop, and none waits for one that did.
            everywhere = self.ranks.sum_(total.detach().clone()).item()
            if not math.isfinite(everywhere):
                raise NonFiniteError(step=step, what="loss", value=everywhere, micro_batch=index)
            total.backward()
        totals.loss += parts.cross_entropy.item() * share.targets
        for name, value in parts.balance.items():
            totals.balance[name] += value.item()
        for index, value in enumerate(parts.mtp):
            totals.mtp[index] += value.item() * share.targets
        if recorder:
            recorder.hear_all(tape.decisions, torch.from_numpy(batch.domain_ids_B).to(self.device))

    @torch.no_grad()
    def _first_pass(self, step: int, micro_batches: Sequence[AnyBatch]) -> tuple[dict[int, Tensor] | None, float]:
        """The whole step's choices where a loss needs them before the step's end, and the seconds it took.

        Routers draw the random numbers that they will draw again. One micro-batch needs no pass of its own: its
        choices are known before its loss.
        """
        is_needed = any(BALANCE_LOSSES[name].scope == "step" for name, _ in self.settings.balance_losses)
        if len(micro_batches) == 1 or not is_needed or not routers_of(self.model.config):
            return None, 0.0
        started = time.perf_counter()
        counts = StepCounts(self.ranks)
        with _leaving_no_trace(self.model):
            for batch in micro_batches:
                tape, tensors = RoutingTape(), tensors_of(batch, self.document_attention, self.device)
                places: dict[str, Any] = {"mask_BS": tensors.mask_BS, **tensors.beside}
                h_0 = self._carried(tensors.inputs_BS, **places, tape=tape)
                if self._num_further(step) and isinstance(self.model, Decoder):
                    further = hidden_and_targets(self.model, h_0, tensors.inputs_BS, tensors.targets_BS, tape, **places)
                    deque(further, maxlen=0)  # to its end: the tape hears them
                counts.add(tape.decisions)
        return counts.so_far, time.perf_counter() - started

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        with recompute_layers(self.model) if self.settings.recompute == "layers" else nullcontext():
            yield

    def _load(self, recorder: LoadRecorder | None, number: int) -> StepLoad | None:
        return sum_loads(self.ranks.gather(recorder.finish_step(number))) if recorder else None


@contextmanager
def _leaving_no_trace(model: Model) -> Iterator[None]:
    """Random numbers and buffers (biases, running means) are after the block what they were before it."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with undisturbed():
            yield
    finally:
        for buffer, values in before:
            buffer.copy_(values)


class _Totals:
    """What is added up over a step's micro-batches."""

    def __init__(self, coefficients: dict[str, float], counts: StepCounts, num_further: int) -> None:
        self.coefficients, self.counts = coefficients, counts
        self.loss = 0.0
        self.mtp = [0.0] * num_further
        self.balance = dict.fromkeys(coefficients, 0.0)

    def sum_over(self, ranks: Ranks) -> None:
        """Add the other ranks' parts: what is a share of the step here is the step afterwards."""
        numbers = torch.tensor([self.loss, *self.mtp, *self.balance.values()], dtype=torch.float64)
        self.loss, *rest = ranks.sum_(numbers).tolist()
        self.mtp, balance = rest[: len(self.mtp)], rest[len(self.mtp) :]
        self.balance = dict(zip(self.balance, balance, strict=True))
