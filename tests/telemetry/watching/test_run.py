import json
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic.errors import DataError, RunFolderError
from moesaic.telemetry.watching import progress, run
from moesaic.telemetry.watching.progress import Progress
from moesaic.telemetry.watching.run import WatchedRun
from tests.telemetry.watching.lines import append, line, run_folder


@pytest.fixture(autouse=True)
def always_look(monkeypatch):
    monkeypatch.setattr(run, "LOOK_EVERY_S", -1.0)


def test_a_run_is_followed_from_before_its_first_step_to_its_last(tmp_path):
    folder = run_folder(tmp_path / "run", steps=4)
    watched = WatchedRun(folder)
    first = watched.state()
    assert (first["status"], first["step"], first["num_steps"]) == ("waiting", 0, 4)
    append(folder, line(1), line(2, held_out_bits_per_byte=2.5, held_out_by_domain={"a": 2.5}))
    second = watched.state(first["version"])
    assert (second["status"], second["step"], second["seconds_left"]) == ("running", 2, 1.0)
    assert second["run"]["held_out"] == [[2, 2.5]]
    assert second["run"]["steps"] == [1, 2] and second["run"]["loss"] == [4.99, 4.98]
    assert second["run"]["router"]["layers"][1]["ratios"] == [[1.6, 0.4, 0.8, 1.2]] * 2
    assert watched.state(second["version"])["run"] is None
    append(folder, line(3), end="")
    assert watched.state()["step"] == 2
    append(folder, end="\n")
    append(folder, line(4))
    last = watched.state(second["version"])
    assert (last["status"], last["seconds_left"]) == ("finished", None)
    json.dumps(last, allow_nan=False)


def test_a_run_that_is_taken_up_again_forgets_what_was_cut(tmp_path):
    folder = run_folder(tmp_path / "run")
    append(folder, *(line(step) for step in range(1, 9)))
    watched = WatchedRun(folder)
    assert watched.state()["step"] == 8
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:5]))
    append(folder, line(6, loss=1.0))
    again = watched.state()
    assert (again["step"], again["restarts"], again["run"]["loss"][-1]) == (6, 1, 1.0)


def test_a_silent_run_and_damaged_lines_are_told(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "run")
    append(folder, line(1))
    damaged = '{"step": 2, "loss"\n{"loss": 3}\n{"kind": "note"}\n'
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + damaged)
    monkeypatch.setattr(run, "QUIET_S", -1.0)
    watched = WatchedRun(folder)
    monkeypatch.setattr(watched, "_age_s", lambda: 500.0)
    state = watched.state()
    assert state["status"] == "quiet" and "8 min 20 s" in state["status_text"]
    assert (state["unreadable"], state["step"]) == (2, 1)


def test_folders_that_are_no_runs(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    (tmp_path / "other").mkdir()
    for name, seen in (("sweep", "holds a sweep"), ("other", "no recipe.json"), ("nowhere", "no folder")):
        with pytest.raises(RunFolderError, match=seen):
            WatchedRun(tmp_path / name)


def test_long_runs_keep_few_points_and_lose_no_rows(monkeypatch):
    monkeypatch.setattr(progress, "MOST_POINTS", 40)
    random, counts, followed = np.random.default_rng(0), np.zeros(4, int), Progress()
    for step in range(1, 1001):
        one = random.integers(0, 50, 4)
        counts += one
        followed.add(line(step, counts=tuple(map(int, one)), loss=float(step)))
    tree = followed.to_json()
    steps = tree["steps"]
    assert 20 <= len(steps) <= 41 and steps[-1] == 1000 and steps == sorted(steps)
    weights = np.diff([0, *steps])
    assert np.average(tree["loss"], weights=weights) == pytest.approx(500.5)
    loads = [each.load for each in [*followed._stretches, followed._open] if each is not None]
    kept = np.sum([load.layers[0].counts_E for load in loads if load is not None], axis=0)
    assert kept.tolist() == counts.tolist()


def test_a_dense_model_has_no_router():
    followed = Progress()
    followed.add({"step": 1, "loss": 2.0, "tokens_per_s": 3.0})
    assert followed.to_json()["router"] is None


ODD: tuple[Any, ...] = (
    None,
    [],
    {},
    "x",
    -1,
    float("inf"),
    float("nan"),
    10**400,
    True,
    [[1]],
    [1, 2, 3, 4, 5],
    -5.5,
    0,
)


def _places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from _places(value, (*place, key))


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_line_with_any_wrong_value_harms_no_other(data, tmp_path_factory):
    folder = run_folder(tmp_path_factory.mktemp("run"))
    lines = [line(step, held_out_bits_per_byte=2.0, held_out_by_domain={"a": 2.0}) for step in range(1, 7)]
    *way, name = data.draw(st.sampled_from(list(_places(lines[2]))))
    reduce(getitem, way, lines[2])[name] = data.draw(st.sampled_from(ODD))
    watched = WatchedRun(folder)
    for each in (lines[:5], lines[5:]):
        append(folder, *each)
        state = watched.state()
        json.dumps(state, allow_nan=False)
    assert state["step"] == 6 and state["unreadable"] <= 1 and len(state["run"]["steps"]) >= 5


@pytest.mark.parametrize(
    "raw", [b"\xff\xfe", b"{", b"null", b"5", b'["loss"]', b'{"loss": 1}', b"[" * 100_000, b"\0\0"]
)
def test_lines_that_are_none_are_counted(tmp_path, raw):
    folder = run_folder(tmp_path / "run")
    append(folder, line(1))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(raw + b"\n")
    append(folder, line(2))
    state = WatchedRun(folder).state()
    assert (state["step"], state["unreadable"]) == (2, 1)


@pytest.mark.parametrize(
    "recipe", ["", "[]", "{}", *(f'{{"recipe": {part}}}' for part in ("null", "[]", '{"train": null}', '{"model": 3}',
                                                                    '{"train": {"steps": "x"}}', '{"train": [5]}'))]
)  # fmt: skip
def test_a_recipe_that_is_none_hides_no_curves(tmp_path, recipe):
    folder = run_folder(tmp_path / "run")
    append(folder, line(1), line(2))
    (folder / "recipe.json").write_text(recipe)
    state = WatchedRun(folder).state()
    assert (state["step"], state["num_steps"], state["status"]) == (2, None, "running")


def test_another_model_s_lines_are_not_added_up():
    followed = Progress()
    followed.add(line(1))
    with pytest.raises(DataError, match="other layers or experts"):
        followed.add(line(2, counts=(1, 2, 3)))
    assert followed.to_json()["steps"] == [1]
