"""The training loop: straight, and the same bits for the same seed.

B batch, S sequence.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from moesaic.data.loader import Batches, Packed
from moesaic.errors import MoesaicError
from moesaic.evaluate.perplexity import HeldOutLoss, held_out_loss
from moesaic.hub.saving import SavesItself
from moesaic.layers.moe import MoeLayer
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingTape
from moesaic.routing.balancers import update_selection_bias
from moesaic.telemetry.load import StepLoad
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.train.loss import losses
from moesaic.train.optimizer import adamw, clip_gradients
from moesaic.train.recipe import TrainSettings
from moesaic.train.resume import RunFolder
from moesaic.train.schedule import learning_rate


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did. Losses in nats a token; seconds is the training time so far, evaluations left out."""

    step: int
    tokens: int
    seconds: float
    loss: float
    balance: dict[str, float]
    learning_rate: float
    gradient_norm: float
    tokens_per_s: float
    load: StepLoad


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The held-out loss after `step` steps."""

    step: int
    tokens: int
    seconds: float
    loss: HeldOutLoss


@dataclass
class History:
    """All reports of a run, in order."""

    steps: list[StepReport] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)


Listener = Callable[[StepReport, Evaluation | None], None]


@dataclass
class Trainer:
    """One model in training. `stop_after` ends a run early while its schedule keeps the full length."""

    model: Decoder
    settings: TrainSettings
    packed: Packed
    run: RunFolder | None = None
    tokenizer: SavesItself | None = None
    stop_after: int | None = None

    def __post_init__(self) -> None:
        self.optimizer: torch.optim.Optimizer = adamw(self.model, self.settings)
        self.step = 0
        self.seconds = 0.0
        self.recorder = LoadRecorder.for_model(self.model.config, num_domains=len(self.packed.domains))
        settings = self.settings
        self.batches = Batches(self.packed, settings.batch_size, settings.sequence_length, settings.seed)

    def resume(self) -> bool:
        """Go back to the newest checkpoint of the run's folder; false when there is none."""
        restored = self.run.restore(lambda model: adamw(model, self.settings)) if self.run else None
        if restored is None:
            return False
        self.model, self.optimizer = restored.model, restored.optimizer
        self.step, self.seconds = restored.facts["step"], restored.facts["seconds"]
        return True

    def train(self, listener: Listener | None = None) -> History:
        """Train to the end (or to `stop_after`), evaluating, checkpointing and writing metrics on the way."""
        history = History()
        metrics = self.run.open_metrics(self.step) if self.run else None
        last = self.stop_after or self.settings.steps
        try:
            if self.step == 0:
                history.evaluations.append(self.evaluate())
            while self.step < last:
                report = self.train_step()
                history.steps.append(report)
                evaluation = self._evaluate_if_due(last)
                if evaluation:
                    history.evaluations.append(evaluation)
                if metrics:
                    metrics.write(json.dumps(_metrics_line(report, evaluation)) + "\n")
                if self.run and (self.step % self.settings.checkpoint_every == 0 or self.step == last):
                    facts = {"seconds": self.seconds}
                    self.run.save_checkpoint(self.step, self.model, self.optimizer, facts, self.tokenizer)
                if listener:
                    listener(report, evaluation)
        finally:
            if metrics:
                metrics.close()
        return history

    def train_step(self) -> StepReport:
        """One optimizer step over `micro_batches` batches; selection biases move once, by the whole step's load."""
        started = time.perf_counter()
        settings = self.settings
        self.model.train()
        rate = learning_rate(
            self.step,
            steps=settings.steps,
            peak=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            final_fraction=settings.final_fraction,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, balance = self._accumulate()
        norm = clip_gradients(self.model, settings.clip_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise MoesaicError(
                f"the loss is {loss} and the gradient norm {norm} at step {self.step}; "
                "lower train.learning_rate and start again from the last checkpoint"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        load = self.recorder.finish_step(self.step + 1)
        self._move_selection_biases(load)
        self.step += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return StepReport(
            step=self.step,
            tokens=self.step * settings.tokens_per_step,
            seconds=self.seconds,
            loss=loss,
            balance=balance,
            learning_rate=rate,
            gradient_norm=norm,
            tokens_per_s=settings.tokens_per_step / seconds,
            load=load,
        )

    def evaluate(self, max_tokens: int | None = None) -> Evaluation:
        """The held-out loss of the model as it stands; `max_tokens` a domain (the recipe's when None)."""
        loss = held_out_loss(
            self.model,
            self.packed,
            sequence_length=self.settings.sequence_length,
            max_tokens=max_tokens or self.settings.evaluate_tokens,
        )
        tokens = self.step * self.settings.tokens_per_step
        return Evaluation(step=self.step, tokens=tokens, seconds=self.seconds, loss=loss)

    def _accumulate(self) -> tuple[float, dict[str, float]]:
        """Gradients of the mean over micro-batches: their number changes neither the loss's scale nor the balance's."""
        settings = self.settings
        loss, balance = 0.0, {name: 0.0 for name, _ in settings.balance_losses} if self.model.config.moe_layers else {}
        for index in range(settings.micro_batches):
            batch = self.batches.batch(self.step * settings.micro_batches + index)
            inputs, targets, domain_ids = map(torch.from_numpy, batch)
            tape = RoutingTape()
            parts = losses(self.model, inputs, targets, settings.balance_losses, tape)
            (parts.total / settings.micro_batches).backward()
            self.recorder.set_domains(domain_ids.repeat_interleave(inputs.shape[1]))
            for layer, decision in tape.decisions.items():
                self.recorder.hear(layer, decision)
            loss += parts.cross_entropy.item() / settings.micro_batches
            for name, value in parts.balance.items():
                balance[name] += value.item() / settings.micro_batches
        return loss, balance

    def _move_selection_biases(self, load: StepLoad) -> None:
        counts = {layer.layer: torch.from_numpy(layer.counts_E) for layer in load.layers}
        for module in self.model.modules():
            if isinstance(module, MoeLayer) and module.router.selection_bias is not None:
                rate = self.settings.selection_bias_rate
                update_selection_bias(module.router.selection_bias, counts[module.layer], rate)

    def _evaluate_if_due(self, last: int) -> Evaluation | None:
        due = self.step % self.settings.evaluate_every == 0 or self.step == last
        return self.evaluate() if due else None


def _metrics_line(report: StepReport, evaluation: Evaluation | None) -> dict[str, Any]:
    line: dict[str, Any] = {
        "step": report.step,
        "tokens": report.tokens,
        "seconds": round(report.seconds, 3),
        "loss": report.loss,
        **{f"balance/{name}": value for name, value in report.balance.items()},
        "learning_rate": report.learning_rate,
        "gradient_norm": report.gradient_norm,
        "tokens_per_s": round(report.tokens_per_s, 1),
    }
    if report.load.layers:
        line["load"] = report.load.to_json()
    if evaluation is not None:
        line["held_out_bits_per_byte"] = evaluation.loss.bits_per_byte
        line["held_out_by_domain"] = evaluation.loss.by_domain
    return line
