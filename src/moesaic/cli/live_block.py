"""Watching a model train: a live block on a terminal, a line now and then elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moesaic.cli import output

if TYPE_CHECKING:
    from moesaic.telemetry.live import TrainingStatus
    from moesaic.train.loop import Evaluation, Listener, StepReport

WINDOW = 20  # steps whose load is shown together
LINE_EVERY_S = 15.0


class _Watched:
    """Turns reports into what live.py draws."""

    def __init__(self, name: str, num_steps: int) -> None:
        self.name, self.num_steps = name, num_steps
        self.loads: deque = deque(maxlen=WINDOW)
        self.bits_per_byte: float | None = None
        self.capacity_gap: float | None = None
        self.started = time.perf_counter()
        self.first_step: int | None = None

    def status(self, report: "StepReport", evaluation: "Evaluation | None") -> "TrainingStatus":
        """What to draw after a step, over the window of the last ones."""
        from moesaic.telemetry.live import TrainingStatus
        from moesaic.telemetry.load import sum_loads

        if self.first_step is None:
            self.first_step = report.step - 1
        if report.load.layers:
            self.loads.append(report.load)
        if evaluation is not None:
            self.bits_per_byte = evaluation.loss.bits_per_byte
            self.capacity_gap = evaluation.capacity_gap
        return TrainingStatus(
            name=self.name,
            step=report.step,
            num_steps=self.num_steps,
            elapsed_s=time.perf_counter() - self.started,
            tokens_per_s=report.tokens_per_s,
            loss=report.loss,
            bits_per_byte=self.bits_per_byte,
            capacity_gap=self.capacity_gap,
            load=sum_loads(self.loads) if self.loads else None,
            first_step=self.first_step,
        )


@contextmanager
def watch(name: str, num_steps: int) -> Iterator["Listener"]:
    """Yield a listener for `Trainer.train` that shows how `name` is doing, on stderr."""
    watched = _Watched(name, num_steps)
    if not sys.stderr.isatty():
        yield _line_listener(watched)
        return
    from rich.console import Console
    from rich.live import Live

    from moesaic.telemetry.live import render

    with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as live:

        def show(report: "StepReport", evaluation: "Evaluation | None") -> None:
            live.update(render(watched.status(report, evaluation)))

        yield show


def _line_listener(watched: _Watched) -> "Listener":
    from moesaic.telemetry.live import render_line

    last = watched.started

    def show(report: "StepReport", evaluation: "Evaluation | None") -> None:
        nonlocal last
        status = watched.status(report, evaluation)
        if time.perf_counter() - last >= LINE_EVERY_S or report.step == watched.num_steps:
            last = time.perf_counter()
            output.talk(render_line(status))

    return show
