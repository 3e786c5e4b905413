"""benchmarks/plan_here.py: every cell once, however often it is started."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.plan.verify import load
from tests.benchmark_programs import imported
from tests.plan.test_here import RATES


def test_a_stopped_run_goes_on_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    kept, ran = tmp_path / "cells.jsonl", []
    with imported(["made_models", "plan_here"]) as programs:
        study = programs.plan_here

        class Worker:
            def __init__(self, job) -> None:
                self.job = job
                self.peak = [study.Seen(job, "peak_bytes", "peak memory", 0, "int8", 1e8, 1e8)]

            def sample(self):
                if len(ran) == 5:
                    ran.append(None)
                    raise SystemExit("stopped")
                ran.append(self.job)
                return [
                    study.Seen(self.job, "decode_s", f"cell {n}", 8, "int8", 1.0 + len(ran), 2.0, 1e9, 1.0)
                    for n in range(3)
                ]

            def end(self) -> None:
                pass

        monkeypatch.setattr(study, "Worker", Worker)
        monkeypatch.setattr(study, "measured_rates", lambda: RATES)
        asked = ["--made", "fine,dense", "--formats", "own,8", "--samples", "3", "--json", str(kept)]
        monkeypatch.setattr(sys, "argv", ["plan_here.py", *asked])
        with pytest.raises(SystemExit, match="stopped"):
            study.main()
        assert not kept.exists()
        study.main()
        jobs = [study.Job(model, format_) for model in ("fine", "dense") for format_ in ("own", "8")]
        assert ran[:5] == [*jobs, jobs[0]] and ran[6:] == [*jobs[1:], *jobs]  # in turns, none twice
        found = load(kept)
        assert len(found) == 4 * (3 + 1) and {each.predicted for each in found} == {2.0, 1e8}
        first = [each.measured for each in found if each.model == "fine" and each.setting["packed"] == "own"]
        assert first == [1e8, 6.0, 6.0, 6.0]  # the middle one of 2, 6 and 11
        study.main()
        assert len(ran) == 13 and load(kept)[0].measured == 1e8
        monkeypatch.setattr(study, "measured_rates", lambda: replace(RATES, about={"share": 0.5}))
        with pytest.raises(SystemExit, match="50% of the processors"):
            study.main()


def test_made_up_models_are_of_the_sizes_that_are_promised() -> None:
    with imported(["made_models"]) as programs:
        models = programs.made_models
        assert all(50e6 < models.made(name).total < 500e6 for name in models.MADE)
