"""Trains a tiny model in forked processes, kills each with SIGKILL at a random moment, and goes on from what is there.

Forked, so that the packages are read once: a kill then costs a tenth of a second and not five.
usage: python kill_harness.py FOLDER KILLS SEED   (FOLDER/whole and FOLDER/killed come to be; talks JSON lines)
"""

import hashlib
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from pathlib import Path

from moesaic.models.decoder import Decoder
from moesaic.train.resume import RunFolder
from tests.train.tiny_run import BIASED, PACKED, DrawingTrainer, changed, seed_everything

SETTINGS = changed(
    steps=80,
    checkpoint_every=1,
    evaluate_every=7,
    micro_batches=2,
    optimizer="muon",
    precision="bf16",
    ema_decay=0.9,
    selection_bias_rate=0.01,
    keep_checkpoints=2,
    evaluate_tokens=16,
)


class LoggedBatches:
    """Writes down what every batch was: one line each, also of steps whose process is killed later."""

    def __init__(self, batches, place: Path) -> None:
        self.batches, self.place = batches, place

    def batch(self, number: int):
        batch = self.batches.batch(number)
        digest = hashlib.sha256(b"".join(array.tobytes() for array in batch)).hexdigest()
        with self.place.open("a") as file:
            file.write(json.dumps([number, digest]) + "\n")
        return batch


def train(path: Path, step_pipe: int | None = None) -> None:
    seed_everything()
    with RunFolder.claim(path) as folder:
        run = DrawingTrainer(Decoder(BIASED).initialize(0), SETTINGS, PACKED, run=folder)
        run.batches = LoggedBatches(run.batches, path / "seen.jsonl")  # pyright: ignore[reportAttributeAccessIssue]
        run.resume()
        run.train(lambda report, evaluation: os.write(step_pipe, b".") if step_pipe is not None else None)


def train_until_killed(path: Path, chance: random.Random) -> dict:
    """One process: it is killed after a random number of steps (often none: while it resumes) and a random delay."""
    ours, its = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            train(path, its)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(its)
    steps = chance.choice([0, 1, 1, 2, 3, 4, 5, 6])
    for _ in range(steps):
        os.read(ours, 1)
    delay = chance.uniform(0, 0.25 if steps == 0 else 0.03)
    select.select([], [], [], delay)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    os.close(ours)
    left = sorted(entry.name for entry in (path / "checkpoints").glob("*")) if (path / "checkpoints").exists() else []
    return {"steps": steps, "delay": delay, "killed": os.WIFSIGNALED(status), "status": status, "left": left}


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    started = time.perf_counter()
    for _ in range(kills):
        print(json.dumps(train_until_killed(folder / "killed", chance)), flush=True)
    train(folder / "killed")
    train(folder / "whole")
    print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
