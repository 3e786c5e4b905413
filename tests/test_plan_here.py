"""benchmarks/plan_here.py: every cell once, however often it is started."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.plan.verify import Prediction, load
from tests.benchmark_programs import imported
from tests.plan.test_here import RATES


def test_a_stopped_run_goes_on_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    kept, ran = tmp_path / "cells.jsonl", []
    with imported(["made_models", "plan_here"]) as programs:
        study = programs.plan_here

        def run_apart(job, samples: int) -> list[Prediction]:
            ran.append(job)
            if len(ran) == 3:
                raise subprocess.CalledProcessError(1, "stopped")
            one = Prediction(source="bench", model=job.name, quantity="decode_s", predicted=1, measured=1, setting={})
            return [replace(one, setting={"packed": job.format, "case": f"cell {n}"}) for n in range(study.CELLS)]

        monkeypatch.setattr(study, "run_apart", run_apart)
        monkeypatch.setattr(study, "measured_rates", lambda: RATES)
        monkeypatch.setattr(
            sys, "argv", ["plan_here.py", "--made", "fine,dense", "--formats", "own,8", "--json", str(kept)]
        )
        with pytest.raises(subprocess.CalledProcessError):
            study.main()
        assert len(load(kept)) == 2 * study.CELLS
        study.main()
        assert [tuple(job) for job in ran[3:]] == [("dense", "own"), ("dense", "8")]
        assert len({json.dumps(vars(each)) for each in load(kept)}) == 4 * study.CELLS
        monkeypatch.setattr(study, "measured_rates", lambda: replace(RATES, about={"share": 0.5}))
        with pytest.raises(SystemExit, match="50% of the processors"):
            study.main()


def test_made_up_models_are_of_the_sizes_that_are_promised() -> None:
    with imported(["made_models"]) as programs:
        models = programs.made_models
        assert all(50e6 < models.made(name).total < 500e6 for name in models.MADE)
