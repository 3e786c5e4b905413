"""`moesaic watch` and `moesaic train --watch`."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from tests.cli.tiny_recipe import RECIPE
from tests.telemetry.watching.lines import append, line, run_folder


def test_where_a_run_stands_as_json(moesaic, tmp_path):
    folder = run_folder(tmp_path / "run")
    append(folder, line(1), line(2))
    ran = moesaic("watch", folder, "--json")
    assert ran.exit_code == 0, ran.err
    assert (ran.json["step"], ran.json["run"]["steps"]) == (2, [1, 2])


def test_mistakes(moesaic, tmp_path):
    folder = run_folder(tmp_path / "run")
    for arguments, seen in (
        (("watch", tmp_path / "nowhere"), "no folder"),
        (("watch", tmp_path), "no recipe.json"),
        (("watch", folder, "--port", "99999"), "--port 99999"),
        (("train", "--out", tmp_path / "o", "--no-browser"), "--no-browser"),
        (("train", "--out", tmp_path / "o", "--watch", "--sweep", "train.seed=1,2"), "--watch follows one run"),
    ):
        ran = moesaic(*arguments)
        assert (ran.exit_code, ran.out, seen in ran.err) == (2, "", True), ran.err


def test_the_page_is_served_until_ctrl_c(tmp_path):
    folder = run_folder(tmp_path / "run")
    append(folder, line(1))
    command = [sys.executable, "-m", "moesaic", "watch", str(folder), "--no-browser"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    found = re.search(r"http://127\.0\.0\.1:\d+/", child.stderr.readline())
    assert found is not None
    with urllib.request.urlopen(found[0] + "state", timeout=30) as answer:
        assert json.load(answer)["step"] == 1
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0
    assert err.splitlines()[-1] == f"next: moesaic inspect {folder}"


@pytest.mark.slow
def test_training_shows_its_page_and_takes_it_away(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        for number in range(25):
            (tmp_path / "texts" / name / f"{number}.txt").write_text(f"{number} some words of {name} " * 9)
    (tmp_path / "r.toml").write_text(RECIPE.replace("steps = 2", "steps = 400"))
    command = [sys.executable, "-m", "moesaic", "train", "--config", str(tmp_path / "r.toml"), "--out"]
    command += [str(tmp_path / "run"), "--corpus", str(tmp_path / "texts"), "--watch", "--no-browser"]
    environment = os.environ | {"MOESAIC_CACHE": str(tmp_path / "cache")}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    assert child.stderr is not None
    found = None
    while found is None:
        words = child.stderr.readline()
        assert words, "training ended without a page"
        found = re.search(r"http://127\.0\.0\.1:\d+/", words)
    with urllib.request.urlopen(found[0] + "state", timeout=60) as answer:
        assert json.load(answer)["num_steps"] == 400
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    # The page's process hears that its parent is gone, however that went.
    for _ in range(200):
        try:
            urllib.request.urlopen(found[0] + "state", timeout=5).close()
        except OSError:
            return
    pytest.fail("the page is still there")
