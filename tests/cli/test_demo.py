import json
from pathlib import Path

import pytest

from moesaic.cli import demo
from moesaic.cli.main import main
from moesaic.telemetry.report_data import ReportData


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = {"prose": "the cat sat on the mat and looked at the dog. ", "code": "x = f(y) + 1\nreturn x\n"}
    for domain, words in texts.items():
        folder = tmp_path / "corpus" / domain
        folder.mkdir(parents=True)
        for number in range(40):
            (folder / f"{number:02}.txt").write_text(f"{domain} {number}: {words}" * 60)
    return tmp_path / "corpus"


@pytest.mark.slow
def test_the_whole_demo_on_a_folder(tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "FEWEST_STEPS", 6)
    out = tmp_path / "demo"
    assert main(["demo", "--minutes", "1", "--corpus", str(corpus), "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    shown = json.loads(captured.out)
    moe, narrow, wide = shown["models"]
    assert moe["active_parameters"] == pytest.approx(narrow["active_parameters"], rel=0.01)
    assert moe["total_parameters"] == pytest.approx(wide["total_parameters"], rel=0.01)
    assert len(shown["verdicts"]) == 7
    assert shown["continuations"][0]["text"]
    assert captured.err.splitlines()[-1] == f"next: {shown['commands'][0]['line']}"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "")
    assert ReportData.from_json(json.loads((out / "report.json").read_text())).models[0].name == "MoE"
    assert main(["generate", str(out / "model"), "--prompt", "the cat", "--max-new-tokens", "3"]) == 0


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_too_short_a_time_is_refused(capsys):
    assert main(["demo", "--minutes", "0.1"]) == 2
    assert "give 1 or more" in capsys.readouterr().err
