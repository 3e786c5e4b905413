"""What `bench` and `train` hand on to `moesaic plan verify`: what was foretold of this machine beside what it took.

Nothing is foretold on a machine whose kernels nobody has measured (`moesaic plan MODEL --machine here` does that).
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli import output
from moesaic.errors import ConfigError
from moesaic.plan import verify
from moesaic.plan.rates import measured_rates
from moesaic.plan.training_kernels import TrainingCell, measured_training

if TYPE_CHECKING:
    from moesaic.bench.bound import Held
    from moesaic.bench.reached import Case
    from moesaic.train.loop import Trainer
    from moesaic.train.reports import Evaluation, StepReport

_WARMING = 1
"""First steps of a run, in which memory is touched for the first time."""


def keep_bench(model: str, kept: "Held", cases: "Sequence[tuple[Case, float]]", threads: int) -> None:
    """Store what was foretold of each case, at the context that its texts had; nothing for other threads."""
    rates = measured_rates()
    if rates is None or rates.about.get("threads", threads) != threads:
        return
    from moesaic.bench.foretold import predictions

    try:
        found = list(predictions(rates, kept, model, cases))
    except ConfigError as error:  # a format that was not measured
        output.talk(f"nothing was foretold: {error}")
        return
    verify.store(found)
    errors = ", ".join(f"{each.setting['case']} {each.error:+.0%}" for each in found)
    output.talk(f"foretold against measured: {errors}; `moesaic plan verify` shows all so far")


class StepWatch:
    """Hears of a run's steps, and stores what was foretold of them when it ends."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        self._seconds: list[float] = []
        self._peak = 0.0

    def __call__(self, report: "StepReport", evaluation: "Evaluation | None") -> None:
        self._seconds.append(report.seconds)
        self._peak = max(self._peak, float(report.peak_memory_bytes))

    def keep(self, model: str, folder: Path) -> None:
        """Into moesaic's state folder, and the run's."""
        rates, steps = measured_training(), self._seconds[_WARMING:]
        config, settings = self._trainer.model.config, self._trainer.settings
        if rates is None or not steps or config.encoder is not None or config.mtp:
            return
        cell = TrainingCell(
            config=config,
            sequences=settings.batch_size,
            length=settings.sequence_length,
            precision=settings.precision,
            micro_batches=settings.micro_batches,
            recompute=settings.recompute == "layers",
        )
        setting = {"sequences": cell.sequences, "length": cell.length, "precision": cell.precision}
        took = verify.Prediction(
            source="train",
            model=model,
            quantity="step_s",
            predicted=rates.step_seconds(cell),
            measured=statistics.median(steps),
            setting=setting,
        )
        held = verify.Prediction(
            source="train",
            model=model,
            quantity="peak_bytes",
            predicted=rates.peak_bytes(cell),
            measured=self._peak,
            setting=setting,
        )
        verify.store([took, held], folder / verify.FILE)
        output.talk(f"foretold against measured: a step {took.error:+.0%}, peak memory {held.error:+.0%}")
