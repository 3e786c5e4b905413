"""What a run tells of itself: a report a step, an evaluation now and then, and metrics.jsonl."""

import json
import os
import re
from collections import deque
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.errors import RunFolderError
from moesaic.evaluate.perplexity import HeldOutLoss
from moesaic.telemetry.load import StepLoad
from moesaic.telemetry.raw_file import write_whole


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did. Losses in nats a token; seconds is the training time so far, evaluations left out.

    coefficients: what each balance loss was multiplied by. peak_memory_bytes: the most resident memory of the process
    so far. first_pass_s: what of the step's time went into counting its choices beforehand, for balance losses that
    need them. mtp: the loss of each layer that predicts further tokens.
    """

    step: int
    tokens: int
    seconds: float
    loss: float
    balance: dict[str, float]
    coefficients: dict[str, float]
    selection_bias_rate: float
    learning_rate: float
    gradient_norm: float
    tokens_per_s: float
    peak_memory_bytes: int
    load: StepLoad
    mtp: tuple[float, ...] = ()
    first_pass_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The held-out loss after `step` steps, no row dropped.

    ema_loss: that of the averaged weights, where a run keeps them. capacity_loss: with rows dropped as in training,
    where a layer has a capacity.
    """

    step: int
    tokens: int
    seconds: float
    loss: HeldOutLoss
    ema_loss: HeldOutLoss | None = None
    capacity_loss: HeldOutLoss | None = None

    @property
    def capacity_gap(self) -> float | None:
        """How many more bits per byte the model loses with its capacity; None without one."""
        return None if self.capacity_loss is None else self.capacity_loss.bits_per_byte - self.loss.bits_per_byte


@dataclass
class History:
    """The reports of a run, in order."""

    steps: MutableSequence[StepReport] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    @classmethod
    def of_last(cls, num_steps: int | None) -> "History":
        """One that forgets all but the last `num_steps` step reports; None keeps every one, with its loads."""
        return cls() if num_steps is None else cls(steps=deque(maxlen=num_steps))


Listener = Callable[[StepReport, Evaluation | None], object]
"""Told of every step, and of the evaluation after it where there was one."""


def metrics_line(report: StepReport, evaluation: Evaluation | None) -> dict[str, Any]:
    """One step as metrics.jsonl has it."""
    line = losses_line(report, evaluation)
    if report.load.layers:
        line["load"] = report.load.to_json()
    return line


def losses_line(report: StepReport, evaluation: Evaluation | None) -> dict[str, Any]:
    """The same without the routing, which takes longer to write than all the rest."""
    line: dict[str, Any] = {
        "step": report.step,
        "tokens": report.tokens,
        "seconds": round(report.seconds, 3),
        "loss": report.loss,
        **{f"mtp_loss/{depth}": value for depth, value in enumerate(report.mtp, 1)},
        **{f"balance/{name}": value for name, value in report.balance.items()},
        **{f"coefficient/{name}": value for name, value in report.coefficients.items()},
        "selection_bias_rate": report.selection_bias_rate,
        "learning_rate": report.learning_rate,
        "gradient_norm": report.gradient_norm,
        "tokens_per_s": round(report.tokens_per_s, 1),
        "peak_memory_bytes": report.peak_memory_bytes,
    }
    if report.first_pass_s:
        line["first_pass_s"] = round(report.first_pass_s, 4)
    if evaluation is not None:
        line["held_out_bits_per_byte"] = evaluation.loss.bits_per_byte
        line["held_out_by_domain"] = evaluation.loss.by_domain
        if evaluation.ema_loss is not None:
            line["ema_held_out_bits_per_byte"] = evaluation.ema_loss.bits_per_byte
            line["ema_held_out_by_domain"] = evaluation.ema_loss.by_domain
        if evaluation.capacity_loss is not None:
            line["capacity_held_out_bits_per_byte"] = evaluation.capacity_loss.bits_per_byte
            line["capacity_held_out_by_domain"] = evaluation.capacity_loss.by_domain
            line["capacity_gap"] = evaluation.capacity_gap
    return line


class MetricsFile:
    """metrics.jsonl: one JSON object a line, handed to the system as soon as it is written.

    Opening it cuts off the steps after `up_to_step`, which will be done again, and a line that was cut short.
    Raises RunFolderError when the disk says no.
    """

    def __init__(self, place: Path, up_to_step: int) -> None:
        self.place = place
        try:
            # Unbuffered: what a full disk refuses must not be tried again when the file is closed.
            self._file = place.open("ab", buffering=0)
            os.truncate(place, _length_up_to(place, up_to_step))
        except OSError as error:
            raise self._refusal(error) from error

    def write(self, line: dict[str, Any]) -> None:
        """Append one object. Raises RunFolderError when the disk says no."""
        try:
            write_whole(self._file, json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise self._refusal(error) from error

    def close(self) -> None:
        """Nothing is left to write: every line went out at once."""
        self._file.close()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _refusal(self, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"cannot write {self.place}: {error.strerror}; free space and go on from the last checkpoint with --resume"
        )


_STEP = re.compile(rb'\{"step": (\d+)[,}]')


def _length_up_to(place: Path, up_to_step: int) -> int:
    """The bytes of the whole lines before the first one of a later step. Lines of other kinds stay where they are."""
    length = 0
    with place.open("rb") as file:
        for line in file:
            found = _STEP.match(line)
            if not line.endswith(b"\n") or (found and int(found[1]) > up_to_step):
                break
            length += len(line)
    return length
