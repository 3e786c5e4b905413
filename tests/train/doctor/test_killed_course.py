"""A stop while a remedy is on trial: it is judged as if nothing had been, or undone where the doctor is gone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.config.capacity import CapacityConfig
from moesaic.train.resume import RunFolder
from tests.train.doctor import killed_course
from tests.train.doctor.sick import CONFIG, kill, looks, theatre
from tests.train.test_capacity import with_moe
from tests.train.test_kill import attempts_of, checkpoints, metrics
from tests.train.tiny_run import changed, trainer

SETTINGS = changed(steps=16, batch_size=8, warmup_steps=0, checkpoint_every=1, evaluate_every=100)


@pytest.mark.slow
@pytest.mark.parametrize(("worse", "judgement"), [(10.0, "kept"), (-1.0, "undone")])
def test_a_run_killed_while_a_remedy_is_on_trial_is_the_run_that_was_not(tmp_path, worse, judgement):
    attempts = attempts_of(killed_course.__file__, tmp_path, worse)
    assert [attempt["killed"] for attempt in attempts] == [True] * len(killed_course.PLANS)
    assert [attempt["log"].count('"treated"') for attempt in attempts] == [1] * len(attempts)
    assert not attempts[-1]["log"].endswith("\n")  # half a line, which is gone at the end
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert [line["doctor"] for line in log(whole)] == ["treated", judgement]
    assert (killed / "doctor.jsonl").read_bytes() == (whole / "doctor.jsonl").read_bytes()
    assert checkpoints(killed) == checkpoints(whole)
    assert metrics(killed) == metrics(whole)


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "doctor.jsonl").read_text().splitlines()]


def gone_on(path: Path, mode: str, steps: int, **look):
    """A run of the folder, with a doctor or without, up to a step; a new one is ill."""
    with RunFolder.claim(path) as folder:
        run = trainer(changed(**vars(SETTINGS) | {"doctor": mode}), CONFIG, run=folder, stop_after=steps)
        if run.doctor is not None:
            run.doctor.settings = looks(**look)
            run.doctor.__post_init__()
        if not run.resume():
            kill(run, 3)
        run.train()
    return run


def test_what_is_on_trial_is_undone_when_the_doctor_is_sent_away(tmp_path):
    gone_on(tmp_path, "act", 6)
    assert [line["doctor"] for line in log(tmp_path)] == ["treated"]
    run = gone_on(tmp_path, "off", 7)
    *_, line = log(tmp_path)
    assert (line["doctor"], line["step"], line["remedy"]) == ("undone", 7, "reseed")
    assert line["sentence"] == "reseed of step 4 is undone: no doctor is left to judge it"
    assert not any(part.master[3].any() for part in theatre(run).expert_weights)
    again = gone_on(tmp_path, "off", 8)
    assert len(log(tmp_path)) == 2 and not theatre(again).expert_weights[0].master[3].any()


def test_a_doctor_who_comes_back_knows_what_was_tried(tmp_path):
    gone_on(tmp_path, "act", 6)
    gone_on(tmp_path, "off", 7)
    back = gone_on(tmp_path, "act", 16)
    assert [line["doctor"] for line in log(tmp_path) if line["finding"] == "dead"] == ["treated", "undone"]
    assert back.doctor is not None and back.doctor.state()[0]["tried"] == [["dead", 0, 3, 2]]


def test_lines_of_steps_that_are_done_again_go_with_the_doctor(tmp_path):
    """Killed between the doctor's line and the checkpoint, and half a line after it."""
    gone_on(tmp_path, "act", 3)
    with (tmp_path / "doctor.jsonl").open("a") as file:
        file.write('{"step": 4, "doctor": "treated", "finding": "dead"}\n{"step": 5, "doc')
    gone_on(tmp_path, "off", 6)
    assert (tmp_path / "doctor.jsonl").read_bytes() == b""


def test_a_wider_capacity_that_was_kept_stays_without_the_doctor(tmp_path):
    config = with_moe(CONFIG, capacity=CapacityConfig(factor=4.0))

    def run_to(steps: int, mode: str, factor: float | None = None) -> float | None:
        with RunFolder.claim(tmp_path) as folder:
            run = trainer(changed(**vars(SETTINGS) | {"doctor": mode}), config, run=folder, stop_after=steps)
            run.resume()
            module = theatre(run).module
            assert module.capacity is not None
            if factor is not None:
                module.capacity = replace(module.capacity, factor=factor)
            run.train()
            return module.capacity.factor

    assert run_to(1, "act", factor=5.0) == 5.0
    assert [run_to(2, "off"), run_to(3, "off"), run_to(4, "act")] == [5.0] * 3
