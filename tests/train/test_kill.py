"""kill -9 at random moments: at the end nobody can tell the run from one that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train import kill_harness

KILLS = 20


def attempts_of(program: str, *arguments: object) -> list[Any]:
    """What a program that kills runs printed, a line of JSON for each attempt."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_twenty_times_is_the_run_that_was_not(tmp_path, seed):
    *attempts, _ = attempts_of(kill_harness.__file__, tmp_path, KILLS, seed)
    assert [attempt["killed"] for attempt in attempts] == [True] * KILLS, "it was done before it could be killed"
    # Some kills must have come in the middle of writing a checkpoint: what was half written is still lying there.
    assert any(name.startswith(".") for attempt in attempts for name in attempt["left"])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert checkpoints(killed) == checkpoints(whole)
    assert metrics(killed) == metrics(whole)
    assert seen(killed) == seen(whole)
    assert len(seen(whole)) == kill_harness.SETTINGS.steps * kill_harness.SETTINGS.micro_batches


def checkpoints(run: Path) -> dict[str, object]:
    """Every file of every checkpoint, as bytes: weights, biases, optimizer, averages, counters, random numbers."""
    found: dict[str, object] = {}
    for path in sorted((run / "checkpoints").rglob("*")):
        name = str(path.relative_to(run))
        if path.name == "trainer.json":
            found[name] = json.loads(path.read_text()) | {"seconds": None}  # what a clock says
        elif path.is_file() and path.name != "SHA256SUMS":
            found[name] = path.read_bytes()
    return found


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "tokens_per_s", "peak_memory_bytes")
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]


def seen(run: Path) -> dict[int, str]:
    """Batch number -> digest of its data. A step that was done again must have seen the same data again."""
    found: dict[int, str] = {}
    for line in (run / "seen.jsonl").read_text().splitlines():
        number, digest = json.loads(line)
        assert found.setdefault(number, digest) == digest
    return found
