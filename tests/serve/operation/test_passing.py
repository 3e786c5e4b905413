"""Folders of servers that load, and what killed ones leave behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

from moesaic.serve.operation.passing import clear_passed, passing_folder

HOLD = """
import sys
from pathlib import Path
from moesaic.serve.operation.passing import passing_folder
with passing_folder(Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def age(folder: Path) -> None:
    an_hour_ago = time.time() - 3600
    os.utime(folder, (an_hour_ago, an_hour_ago))


def test_a_folder_is_gone_in_the_end(tmp_path: Path) -> None:
    with passing_folder(tmp_path / "cache") as folder:
        (folder / "file").write_text("x")
        age(folder)
        assert clear_passed(tmp_path / "cache") == [] and folder.is_dir()
    assert not folder.exists()


def test_of_other_processes_only_the_dead_ones_folders_are_cleared(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        folder = Path(holder.stdout.readline().strip())
        (folder / "file").write_text("x")
        age(folder)
        assert clear_passed(tmp_path) == [] and folder.is_dir()
        holder.kill()
    assert clear_passed(tmp_path) == [folder] and not folder.exists()


def test_a_folder_that_has_just_been_made_is_left(tmp_path: Path) -> None:
    (tmp_path / "loading-new").mkdir()
    (tmp_path / "packed").mkdir()
    age(tmp_path / "packed")
    assert clear_passed(tmp_path) == []
    age(tmp_path / "loading-new")
    assert clear_passed(tmp_path) == [tmp_path / "loading-new"]
    assert (tmp_path / "packed").is_dir()
