"""Folders that last as long as a `with`; what a process that was killed has left, the next one clears away."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "loading-"
_YOUNG_S = 60.0  # a folder that has just been made may not be held yet


@contextmanager
def passing_folder(inside: Path) -> Iterator[Path]:
    """A new folder, gone in the end."""
    inside.mkdir(parents=True, exist_ok=True)
    made = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=inside, ignore_cleanup_errors=True)
    with made as folder, _held(Path(folder)):
        yield Path(folder)


def clear_passed(inside: Path) -> list[Path]:
    """Remove folders that nobody holds, and return them. Other processes may make theirs, and clear, meanwhile."""
    cleared = []
    for folder in inside.glob(f"{_PREFIX}*"):
        with suppress(OSError), _held(folder):  # a process that lives, gone already, or of another user
            if time.time() - folder.stat().st_mtime > _YOUNG_S:
                shutil.rmtree(folder)
                cleared.append(folder)
    return cleared


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Nobody else may hold it. Raises OSError if somebody does; the system lets go when a process ends, however."""
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)
