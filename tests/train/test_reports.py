import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import RunFolderError
from moesaic.train.reports import History, MetricsFile
from tests.train.tiny_run import changed, trainer


def steps(place):
    return [json.loads(line)["step"] for line in place.read_text().splitlines()]


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 400))
@settings(max_examples=100)
def test_whatever_was_cut_off_the_steps_follow_each_other(tmp_path_factory, written, kept, cut_bytes):
    """A run of `written` steps that lost the last `cut_bytes` of its file, resumed at `kept`."""
    place = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    with MetricsFile(place, 0) as metrics:
        for step in range(1, written + 1):
            metrics.write({"step": step, "text": "é" * step})
    whole = place.read_bytes()
    place.write_bytes(whole[: max(0, len(whole) - cut_bytes)])
    left = [json.loads(line)["step"] for line in place.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    with MetricsFile(place, kept) as metrics:
        metrics.write({"step": kept + 1})
    assert steps(place) == [*(step for step in left if step <= kept), kept + 1]


def test_every_line_is_there_at_once(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", 0) as metrics:
        metrics.write({"step": 1})
        assert steps(tmp_path / "metrics.jsonl") == [1]


def test_a_full_disk_is_an_error_of_one_line(tmp_path, monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    with MetricsFile(tmp_path / "metrics.jsonl", 0) as metrics:
        monkeypatch.setattr(metrics, "_file", Full())
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl: No space left on device; free space"):
            metrics.write({"step": 1})
        monkeypatch.undo()


def test_a_history_may_forget():
    run = trainer(changed(steps=3))
    run.keep_reports = 2
    history = run.train()
    assert [report.step for report in history.steps] == [2, 3]
    assert len(History.of_last(None).steps) == 0
