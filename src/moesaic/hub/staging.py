"""Replacing a folder without ever being without one: write beside it, make it durable, then swap."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moesaic.errors import CheckpointError


@contextmanager
def replaced_folder(folder: Path, is_stale: Callable[[str], bool]) -> Iterator[Path]:
    """Yield an empty folder to write to; when the block ends well it takes the place of `folder`.

    Files of the old folder that the new one lacks are kept, but for those whose name `is_stale`. When anything fails
    (a full disk, Ctrl-C) the old folder stays as it was and the new one is removed; an OSError becomes a
    CheckpointError. A power cut between the last two renames leaves the old folder beside, as `.NAME.old-…`.
    """
    target = folder.expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{folder} is a file; choose a folder to save to")
    if Path.cwd().is_relative_to(target):
        raise CheckpointError(f"{folder} holds the current folder and cannot be swapped under it; save to another one")
    tag = uuid.uuid4().hex[:8]
    new, old = target.with_name(f".{target.name}.new-{tag}"), target.with_name(f".{target.name}.old-{tag}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        yield new
        if target.exists():
            _keep_others(target, new, is_stale)
        _sync(new)
        _swap(target, new, old)
    except OSError as error:
        untouched = "what was there is untouched; " if target.exists() else ""
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot save to {folder}: {reason}; {untouched}free space or save elsewhere") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _keep_others(target: Path, new: Path, is_stale: Callable[[str], bool]) -> None:
    """Hard links, so that a file that someone is writing to (a log) stays the same file."""
    for entry in target.iterdir():
        if is_stale(entry.name) or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, to: str | Path) -> None:
    try:
        os.link(source, to, follow_symlinks=False)
    except OSError:  # file systems without hard links
        shutil.copy2(source, to, follow_symlinks=False)


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(target: Path, new: Path, old: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
