"""A sweep's points, their names, what is remembered of them, and that one failure is not the others'."""

import datetime
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError, MoesaicError, RunFolderError
from moesaic.train.sweep import Point, RunResult, Sweep, axes_of_table, parse_axis, points_of

AXES = {"train.learning_rate": [1e-3, 3e-3], "train.seed": [0, 1]}


def result(loss: float) -> RunResult:
    return RunResult(
        model="m",
        steps=3,
        bits_per_byte=loss,
        by_domain={"prose": loss},
        training_seconds=1.5,
        total_parameters=9,
        active_parameters=4,
    )


def losses(point: Point) -> RunResult:
    return result(point.changes["train.learning_rate"] * 1000 + point.changes["train.seed"])


def test_points_are_the_grid_with_readable_names():
    points = points_of(AXES)
    assert [point.name for point in points] == [
        "learning_rate=0.001,seed=0",
        "learning_rate=0.001,seed=1",
        "learning_rate=0.003,seed=0",
        "learning_rate=0.003,seed=1",
    ]
    assert points[2].changes == {"train.learning_rate": 3e-3, "train.seed": 0}


values = st.one_of(st.integers(-5, 5), st.text(max_size=120), st.lists(st.lists(st.text(max_size=9), max_size=2)))


@given(st.lists(values, min_size=1, max_size=6, unique_by=lambda value: json.dumps(value)))
def test_names_are_different_and_fit_for_folders(swept):
    names = [point.name for point in points_of({"train.balance_losses": swept, "data.seed": [1]})]
    assert len(set(names)) == len(names)
    assert all(name.isascii() and "/" not in name and len(name) < 120 for name in names)


def test_names_stay_in_the_folder_and_keep_a_minus():
    (point,) = points_of({"model.../../evil": [1]})
    assert point.name == "evil=1"
    (point,) = points_of({"a/../x.seed": [-1], "b.seed": ["../up/"]})
    assert point.name == "a-..-x.seed=-1,b.seed=..-up"
    assert [point.name for point in points_of({"train.warmup_steps": [-1, 1]})] == ["warmup_steps=-1", "warmup_steps=1"]


def test_a_value_that_json_lacks_has_a_name_too():
    (point,) = points_of({"model.x": [datetime.date(2024, 1, 1)]})
    assert point.name == "x=2024-01-01"


def test_fields_of_one_name_keep_their_tables():
    (point,) = points_of({"model.size": [1], "train.size": [2]})
    assert point.name == "model.size=1,train.size=2"


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("train.learning_rate=1e-3,3e-3", ("train.learning_rate", [1e-3, 3e-3])),
        ("train.schedule=cosine, wsd", ("train.schedule", ["cosine", "wsd"])),
        ("train.seed=4", ("train.seed", [4])),
        ('train.balance_losses=[[["switch", 0.1]], []]', ("train.balance_losses", [[["switch", 0.1]], []])),
    ],
)
def test_axes_of_the_command_line(text, axis):
    assert parse_axis(text) == axis


def test_axes_of_a_table():
    assert axes_of_table({"train": {"seed": [1, 2]}, "data.weights": ["uniform"]}) == {
        "train.seed": [1, 2],
        "data.weights": ["uniform"],
    }


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: parse_axis("train.seed"), "write table.field=value,value"),
        (lambda: parse_axis("train.seed="), "write table.field=value,value"),
        (lambda: axes_of_table({"train": {"seed": 5}}), "train.seed=5; it must be a list of values"),
        (lambda: axes_of_table([1]), "it must be a table of fields"),
        (lambda: points_of({}), "--sweep without anything to vary"),
        (lambda: points_of({"train.seed": []}), "train.seed has no values"),
        (lambda: points_of({"train.seed": [1, 2, 1]}), "has a value twice"),
        (lambda: points_of({"train.seed": list(range(2000))}), "a sweep of 2000 points; at most 1000"),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)


def test_all_are_trained_ranked_and_recorded(tmp_path):
    (tmp_path / "learning_rate=0.001,seed=0").mkdir()
    line = {"step": 1, "tokens": 64, "seconds": 0.5, "loss": 4.0, "held_out_bits_per_byte": 3.0}
    (tmp_path / "learning_rate=0.001,seed=0" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    said: list[str] = []
    sweep = Sweep.begin(tmp_path, AXES, resume=False)
    sweep.run(losses, said.append)
    assert [point.result.bits_per_byte for point in sweep.best_first if point.result] == [1, 2, 3, 4]
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["axes"] == AXES
    assert [point["status"] for point in record["points"]] == ["done"] * 4
    assert said[0] == "point 1 of 4: learning_rate=0.001,seed=0"
    assert "learning_rate=0.001,seed=0" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path):
    def fail_once(point: Point) -> RunResult:
        if point.changes["train.seed"] == 1:
            raise MoesaicError("the loss is nan\nat step 5")
        return losses(point)

    said: list[str] = []
    sweep = Sweep.begin(tmp_path, AXES, resume=False)
    sweep.run(fail_once, said.append)
    assert [point.status for point in sweep.points] == ["done", "failed"] * 2
    assert sweep.points[1].error == "the loss is nan at step 5"
    assert any("seed=1: failed: the loss is nan at step 5" in line for line in said)
    assert [point.status for point in sweep.best_first] == ["done", "done", "failed", "failed"]

    trained: list[str] = []

    def remember(point: Point) -> RunResult:
        trained.append(point.name)
        return losses(point)

    again = Sweep.begin(tmp_path, AXES, resume=True)
    again.run(remember, said.append)
    assert trained == ["learning_rate=0.001,seed=1", "learning_rate=0.003,seed=1"]
    assert all(point.status == "done" and point.error is None for point in again.points)


def test_an_interruption_keeps_what_is_done_and_more_values_may_be_added(tmp_path):
    def stop_at_third(point: Point) -> RunResult:
        if point.changes == {"train.learning_rate": 3e-3, "train.seed": 0}:
            raise KeyboardInterrupt
        return losses(point)

    with pytest.raises(KeyboardInterrupt):
        Sweep.begin(tmp_path, AXES, resume=False).run(stop_at_third, lambda line: None)
    with pytest.raises(RunFolderError, match="holds a sweep with 2 of 4 points done; add --resume"):
        Sweep.begin(tmp_path, AXES, resume=False)
    wider = Sweep.begin(tmp_path, {**AXES, "train.seed": [0, 1, 2]}, resume=True)
    assert [point.status for point in wider.points] == ["done", "done", "waiting"] + ["waiting"] * 3


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "sweep.json").write_text('{"points": [{}]}')
    with pytest.raises(RunFolderError, match=r"sweep.json cannot be read .* delete it"):
        Sweep.begin(tmp_path, AXES, resume=True)


def test_points_that_are_added_take_no_name_that_is_taken(tmp_path):
    """ "a/b" and "a b" are alike as names: the second becomes "-2", whichever of them is asked for later."""

    def train(point: Point) -> RunResult:
        return result(1.0)

    Sweep.begin(tmp_path, {"data.x": ["a/b"]}, resume=False).run(train, lambda line: None)
    sweep = Sweep.begin(tmp_path, {"data.x": ["a b", "a/b"]}, resume=True)
    assert [(point.name, point.status) for point in sweep.points] == [("x=a-b-2", "waiting"), ("x=a-b", "done")]
    sweep._write()
    again = Sweep.begin(tmp_path, {"data.x": ["a:b", "a b", "a/b"]}, resume=True)
    assert [point.name for point in again.points] == ["x=a-b-3", "x=a-b-2", "x=a-b"]


def test_a_record_that_leads_out_of_the_folder_is_refused(tmp_path):
    point = Point(name="../x=1", changes={"data.x": 1}).to_json()
    (tmp_path / "sweep.json").write_text(json.dumps({"points": [point]}))
    with pytest.raises(RunFolderError, match=r"sweep.json cannot be read .* delete it"):
        Sweep.begin(tmp_path, {"data.x": [1]}, resume=True)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you ...")])
def test_a_point_that_is_too_large_does_not_end_the_sweep(tmp_path, error):
    def train(point: Point) -> RunResult:
        if point.changes["train.seed"] == 0:
            raise error
        return losses(point)

    sweep = Sweep.begin(tmp_path, AXES, resume=False)
    sweep.run(train, lambda line: None)
    assert [point.status for point in sweep.points] == ["failed", "done"] * 2
    assert str(sweep.points[0].error).startswith("out of memory; use a smaller model")


def test_a_bug_ends_the_sweep(tmp_path):
    def train(point: Point) -> RunResult:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        Sweep.begin(tmp_path, AXES, resume=False).run(train, lambda line: None)
