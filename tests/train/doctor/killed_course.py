"""Trains a tiny ill model with a doctor, in forked processes that kill themselves (SIGKILL) while a remedy is on trial.

usage: python killed_course.py FOLDER WORSE   (FOLDER/whole and FOLDER/killed come to be; talks JSON lines)
WORSE: how much worse the held-out loss may be at the end of a course, as a part; -1 undoes every remedy.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from moesaic.train.loop import Trainer
from moesaic.train.reports import MetricsFile
from moesaic.train.resume import RunFolder
from tests.train.doctor.sick import CONFIG, kill, looks
from tests.train.tiny_run import changed, seed_everything, trainer

SETTINGS = changed(
    steps=16,
    batch_size=8,
    warmup_steps=0,
    doctor="act",
    checkpoint_every=3,
    evaluate_every=100,
    precision="bf16",
    ema_decay=0.9,
    keep_checkpoints=10,
    async_checkpoints=False,
)
Plan = Callable[[Trainer], None]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_any_checkpoint_knows(run: Trainer) -> None:
    """At the step of the treatment: the newest checkpoint is of an ill model."""
    assert run.doctor is not None
    after_step = run.doctor.after_step

    def dying(*args):
        lines = after_step(*args)
        return die() if lines else lines

    run.doctor.after_step = dying  # pyright: ignore[reportAttributeAccessIssue]


def after_a_checkpoint(run: Trainer) -> None:
    """On trial in the newest checkpoint, and a step later."""
    train_step = run.train_step

    def dying():
        report = train_step()
        newest = run.run.checkpoints[-1][1] if run.run is not None and run.run.checkpoints else None
        if newest is not None and (newest / "doctor.safetensors").exists():
            die()
        return report

    run.train_step = dying  # pyright: ignore[reportAttributeAccessIssue]


def while_it_is_judged(run: Trainer) -> None:
    assert run.doctor is not None
    doctor, held_out = run.doctor, run.doctor.held_out
    doctor.held_out = lambda: held_out() if doctor._course is None else die() or 0.0


def within_a_line_of_the_log(run: Trainer) -> None:
    """Half of the judgement is on disk."""
    write = MetricsFile.write

    def dying(self: MetricsFile, line) -> None:
        if line.get("doctor") in ("kept", "undone"):
            self._file.write(json.dumps(line).encode()[:40])
            die()
        write(self, line)

    MetricsFile.write = dying


PLANS: tuple[Plan, ...] = (
    before_any_checkpoint_knows,
    after_a_checkpoint,
    while_it_is_judged,
    within_a_line_of_the_log,
)


def train(path: Path, worse: float, plan: Plan | None = None) -> None:
    seed_everything()
    with RunFolder.claim(path) as folder:
        run = trainer(SETTINGS, CONFIG, run=folder)
        assert run.doctor is not None
        run.doctor.settings = looks(worse=worse)
        run.doctor.__post_init__()
        if not run.resume():
            kill(run, 3)
        if plan is not None:
            plan(run)
        run.train()


def train_until_killed(path: Path, worse: float, plan: Plan) -> dict:
    process = os.fork()
    if process == 0:
        try:
            train(path, worse, plan)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(process, 0)
    return {"plan": plan.__name__, "killed": os.WIFSIGNALED(status), "log": (path / "doctor.jsonl").read_text()}


def main() -> None:
    folder, worse = Path(sys.argv[1]), float(sys.argv[2])
    for plan in PLANS:
        print(json.dumps(train_until_killed(folder / "killed", worse, plan)), flush=True)
    train(folder / "killed", worse)
    train(folder / "whole", worse)


if __name__ == "__main__":
    main()
