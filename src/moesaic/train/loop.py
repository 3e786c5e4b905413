"""The training loop: straight, the same bits for the same seed, and after a stop the bits it would have had without.

So it is on a CPU. On a GPU the data, their order and all random numbers are the same each time, but some of torch's
operations there add up in no fixed order, so that results are near each other.

B batch, S sequence.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic.data.packed import Packed
from moesaic.data.translation import Pairs
from moesaic.errors import CheckpointError, MoesaicError, NonFiniteError, RunFolderError
from moesaic.evaluate.perplexity import HeldOutLoss
from moesaic.hub.saving import SavesItself
from moesaic.kernels.devices import device_of
from moesaic.layers.moe import capacity_applied
from moesaic.models.build import Model
from moesaic.telemetry.load import StepLoad
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.train.checkpoint import CheckpointWriter
from moesaic.train.diagnose import first_nonfinite
from moesaic.train.doctor import Doctor, DoctorSettings, check_treatable
from moesaic.train.interrupt import Interrupted, StopRequest, stop_on_signals
from moesaic.train.memory import peak_memory_bytes
from moesaic.train.micro_batches import AnyBatch, tensors_of
from moesaic.train.optimizer import Optimizer, restore_state
from moesaic.train.random_state import undisturbed
from moesaic.train.recipe import DataSettings, TrainSettings
from moesaic.train.reports import Evaluation, History, Listener, MetricsFile, StepReport, metrics_line
from moesaic.train.resume import RunFolder, refuse_differences
from moesaic.train.snapshot import copied
from moesaic.train.step import Stepper
from moesaic.train.task import task_of


@dataclass
class Trainer:
    """One model in training, on the device that the settings name: it is moved there.

    stop_after: ends a run early while its schedule keeps the full length.
    packed: what `data.task` learns from: packed text, or Pairs for translation.
    run: where checkpoints and metrics go; without one nothing is written.
    keep_reports: how many of the last steps' reports `train` returns, each with its loads; None: all.
    say: told, a line at a time, what a person at the keyboard should know.
    """

    model: Model
    settings: TrainSettings
    packed: Packed | Pairs
    data: DataSettings = field(default_factory=DataSettings)
    run: RunFolder | None = None
    tokenizer: SavesItself | None = None
    stop_after: int | None = None
    keep_reports: int | None = None
    say: Callable[[str], object] | None = None

    def __post_init__(self) -> None:
        self.device = device_of(self.settings.device, "train.device")
        self.model.to(self.device)
        self.stepper = Stepper(self.model, self.settings, document_attention=self.data.document_attention)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self._writer: CheckpointWriter | None = None
        self.task = task_of(self.packed, self.settings, self.data, self.model.config)
        self.batches = self.task.batches
        num_domains = len(self.task.names)
        self.doctor = None if self.settings.doctor == "off" else self._new_doctor(self.settings.doctor)
        self._left_by_doctor: dict[str, Any] | None = None
        self._last_words: list[dict[str, Any]] = []
        self.recorder: LoadRecorder | None = LoadRecorder.for_model(self.model.config, num_domains=num_domains)

    @property
    def optimizer(self) -> Optimizer:
        """What the stepper keeps of the model: masters, gradients, moments, the average."""
        return self.stepper.optimizer

    @property
    def last_step(self) -> int:
        """The step after which `train` ends, counted from 1."""
        return self.stop_after or self.settings.steps

    def resume(self) -> bool:
        """Go back to the newest checkpoint of the run's folder; false when there is none.

        Raises CheckpointError when it is damaged or does not fit, RunFolderError when it is of another recipe or other
        data; then neither this trainer nor the folder has changed.
        """
        saved = self.run.newest() if self.run else None
        if self.run is None or saved is None:
            return False
        facts = saved.facts
        refuse_differences(self.run.path, facts["run"], self._identity())
        if facts["next_sample"] != self._first_sample(facts["step"]):
            raise CheckpointError(
                f"{saved.folder} stops before sample {facts['next_sample']} and the step after it begins with "
                f"{self._first_sample(facts['step'])}; another version of moesaic wrote it: start in another folder"
            )
        weights = saved.load_weights()
        restore_state(self.model, self.optimizer, saved.load_optimizer_tensors())  # first, for it may refuse
        self.model.load_state_dict(weights)
        self.step, self.seconds, self.tokens = facts["step"], facts["seconds"], facts["tokens"]
        if "doctor" in facts:
            self._restore_doctor(facts["doctor"], saved.load_doctor_tensors())
        saved.restore_random_state()
        return True

    def train(self, *listeners: Listener | None) -> History:
        """Train to the end (or to `stop_after`), evaluating, checkpointing and writing metrics on the way.

        The first Ctrl-C finishes the step, saves it and raises Interrupted; the second one is an ordinary one.
        """
        history = History.of_last(self.keep_reports)
        outlets = [listener for listener in listeners if listener is not None]
        if self.run is None:
            self._train(history, outlets, None, StopRequest())
            return history
        with ExitStack() as stack:
            writer = self._writer = self._new_writer(self.run)
            metrics = stack.enter_context(self.run.open_metrics(self.step))
            stop = stack.enter_context(stop_on_signals(self.say))
            stack.enter_context(writer)
            self._open_doctors_log(self.run, stack)
            outlets.insert(0, lambda report, evaluation: metrics.write(metrics_line(report, evaluation)))
            self._train(history, outlets, writer, stop)
            if stop.is_made:
                raise Interrupted(f"stopped after step {self.step} of {self.last_step}; {self.run.way_back()}")
        return history

    def train_step(self) -> StepReport:
        """One optimizer step over `micro_batches` batches."""
        started = time.perf_counter()
        settings = self.settings
        first = self.step * settings.micro_batches
        micro_batches = [self.batches.batch(first + index) for index in range(settings.micro_batches)]
        if self.step == 0:
            torch.manual_seed(settings.seed)  # of routers' noise and of dropout; later steps and resumed runs go on
        try:
            result = self.stepper.run(self.step, micro_batches, self.recorder)
        except NonFiniteError as error:
            where = self._first_nonfinite(micro_batches[error.micro_batch or 0])
            raise self._stopped(f"the {error.what} is {error.value} at step {self.step + 1}: {where}") from error
        self.step += 1
        self.tokens += result.num_tokens
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return StepReport(
            step=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            loss=result.loss,
            balance=result.balance,
            learning_rate=result.learning_rate,
            gradient_norm=result.gradient_norm,
            tokens_per_s=result.num_tokens / seconds,
            peak_memory_bytes=peak_memory_bytes(self.device),
            load=result.load or StepLoad(step=self.step, layers=()),
            coefficients=result.coefficients,
            selection_bias_rate=result.selection_bias_rate,
            mtp=result.mtp,
            first_pass_s=result.first_pass_s,
        )

    def evaluate(self, max_tokens: int | None = None) -> Evaluation:
        """The held-out loss, of averaged weights too if there are; `max_tokens` a domain (the recipe's when None).

        Always dropless. Where a layer has a capacity, once more with it: their difference is the capacity gap.
        """
        max_tokens = max_tokens or self.settings.evaluate_tokens
        loss, ema_loss = self._held_out_loss(max_tokens), None
        with capacity_applied(self.model) as has_capacity:
            capacity_loss = self._held_out_loss(max_tokens) if has_capacity else None
        if self.settings.ema_decay:
            with self.optimizer.averaged_weights():
                ema_loss = self._held_out_loss(max_tokens)
        return Evaluation(
            step=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            loss=loss,
            ema_loss=ema_loss,
            capacity_loss=capacity_loss,
        )

    def final_model(self) -> Model:
        """What the run is for: the average of the weights where the recipe keeps one, else the model itself."""
        if not self.settings.ema_decay:
            return self.model
        with self.optimizer.averaged_weights():
            return copied(self.model, self.device)

    def _train(
        self, history: History, outlets: Sequence[Listener], writer: CheckpointWriter | None, stop: StopRequest
    ) -> None:
        """The loop itself. Leaves with everything on disk; a request to stop ends it after the step."""
        evaluation = None
        self._say_what_leaks()
        before_s, first_pass_s = self.seconds, 0.0
        if self.step == 0:
            evaluation = self.evaluate()
            history.evaluations.append(evaluation)
        saved_step = self.step
        while self.step < self.last_step and not stop.is_made:
            report = self.train_step()
            history.steps.append(report)
            first_pass_s += report.first_pass_s
            if self.doctor is not None:
                self.doctor.after_step(self.step, report.load)
            evaluation = self.evaluate() if self._evaluation_is_due() else None
            if evaluation is not None:
                history.evaluations.append(evaluation)
            with undisturbed():
                for outlet in outlets:
                    outlet(report, evaluation)
            if writer is None:
                continue
            writer.check()
            if self._checkpoint_is_due() or stop.is_made:
                self._save(writer, evaluation)
                saved_step = self.step
        if writer is not None:
            if self.step > saved_step:  # the request came after the last step was looked at
                self._save(writer, evaluation)
            writer.wait()
        if self.say is not None and first_pass_s:
            spent_s = self.seconds - before_s
            self.say(f"counting choices before each step (global_exact) took {first_pass_s:.1f} s of {spent_s:.1f} s")

    def _new_doctor(self, mode: Literal["advise", "act"]) -> Doctor:
        """One who asks about the run's first batch: the same after a stop."""
        settings = self.settings
        check_treatable(self.model)
        tensors = tensors_of(self.batches.batch(0), self.data.document_attention)
        return Doctor(
            trained=self.stepper,
            mode=mode,
            held_out=lambda: self._held_out_loss(settings.evaluate_tokens).bits_per_byte,
            questions=(tensors.inputs_BS, tensors.document_ids_BS),
            settings=DoctorSettings(rest=settings.warmup_steps, last=settings.steps),
            seed=settings.seed,
            say=lambda line: self.say(line["sentence"]) if self.say is not None else None,
        )

    def _restore_doctor(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The doctor as it was; one who is not called any more undoes what is on trial, and leaves what it knows."""
        if self.doctor is not None:
            self.doctor.restore(facts, tensors)
            return
        former = self._new_doctor("advise")
        former.restore(facts, tensors)
        self._last_words = former.leave(self.step + 1)
        self._left_by_doctor = former.state()[0]

    def _open_doctors_log(self, run: RunFolder, stack: ExitStack) -> None:
        """Without the lines of steps that will be done again, also where the doctor has been sent away."""
        if self.doctor is None and not run.has_doctors_log:
            return
        said = self._said(stack.enter_context(run.open_doctors_log(self.step)))
        for line in self._last_words:
            said(line)
        if self.doctor is not None:
            self.doctor.say = said

    def _said(self, log: MetricsFile) -> Callable[[dict[str, Any]], None]:
        """Writes each line of the doctor's log, and tells its sentence."""

        def write(line: dict[str, Any]) -> None:
            log.write(line)
            if self.say is not None:
                self.say(f"doctor, step {line['step']}: {line['sentence']}")

        return write

    def _say_what_leaks(self) -> None:
        leaking = self.model.config.leaking_parts
        if self.say is not None and leaking:
            self.say(
                f"{', '.join(leaking)}: what a token gets depends on later ones, so losses of whole texts, in training "
                "and held out, tell of the future: do not compare them with other models'"
            )

    def _checkpoint_is_due(self) -> bool:
        return self.step % self.settings.checkpoint_every == 0 or self.step == self.last_step

    def _evaluation_is_due(self) -> bool:
        """Checkpoints are evaluated too where the best are kept: a step without a score cannot be among them."""
        scored = self.run is not None and self.settings.keep_best > 0 and self._checkpoint_is_due()
        return scored or self.step % self.settings.evaluate_every == 0 or self.step == self.last_step

    def _new_writer(self, run: RunFolder) -> CheckpointWriter:
        if any(step > self.step for step, _ in run.checkpoints):
            raise RunFolderError(
                f"{run.path} holds a run at step {run.checkpoints[-1][0]} and this one is at step {self.step}; "
                "resume it, or choose another folder with --out"
            )
        run.sweep()
        settings = self.settings
        return CheckpointWriter(
            run,
            keep_last=settings.keep_checkpoints,
            keep_best=settings.keep_best,
            in_background=settings.async_checkpoints,
            tokenizer=self.tokenizer,
        )

    def _first_sample(self, step: int) -> int:
        """The number of the first sample after `step` steps."""
        return step * self.settings.micro_batches * self.settings.batch_size

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be one of this run, as JSON."""
        parts = {
            "train": dataclasses.asdict(self.settings),
            "data": {**dataclasses.asdict(self.data), "digest": self.packed.digest, **self.task.facts},
            "model": dataclasses.asdict(self.model.config),
        }
        return json.loads(json.dumps(parts))

    def _facts(self, evaluation: Evaluation | None) -> dict[str, Any]:
        score = evaluation.loss.bits_per_byte if evaluation is not None else math.nan
        chart = self._left_by_doctor if self.doctor is None else self.doctor.state()[0]
        return {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "next_sample": self._first_sample(self.step),
            "held_out_bits_per_byte": score if math.isfinite(score) else None,
            "run": self._identity(),
            **({} if chart is None else {"doctor": chart}),
        }

    def _held_out_loss(self, max_tokens: int) -> HeldOutLoss:
        with undisturbed():
            return self.task.held_out_loss(self.model, max_tokens)

    def _first_nonfinite(self, batch: AnyBatch) -> str:
        tensors = tensors_of(batch, self.data.document_attention, self.device)
        return first_nonfinite(
            self.model,
            tensors.inputs_BS,
            tensors.document_ids_BS,
            mask_BS=tensors.mask_BS,
            source=tensors.source,
        )

    def _save(self, writer: CheckpointWriter, evaluation: Evaluation | None) -> None:
        """A checkpoint of this moment; never of a broken one, which would push a good one out."""
        for name, tensor in self.model.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise self._stopped(f"{name} is not finite after step {self.step}, which is not saved")
        doctor_tensors = self.doctor.state()[1] if self.doctor is not None else None
        writer.save(self.model, self.optimizer, self._facts(evaluation), doctor_tensors)

    def _stopped(self, why: str) -> MoesaicError:
        """What ends a run that broke. Going on would break again: a resumed run is the same to the bit."""
        kept = "nothing was saved"
        if self.run is not None:
            if self._writer is not None:
                self._writer.settle()
            found = self.run.checkpoints
            kept = f"the last good checkpoint is {found[-1][1]}" if found else "there is no checkpoint yet"
        return MoesaicError(f"{why}; {kept}; lower train.learning_rate and start again in another folder")
