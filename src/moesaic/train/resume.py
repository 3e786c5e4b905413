"""A run's folder: who is using it, what it has written, and the way back after a stop.

RUN/recipe.json          the recipe and the corpus it was started with
RUN/tokenizer/           the tokenizer of its text, so that going on finds the same one
RUN/metrics.jsonl        one JSON object a line: steps, evaluations
RUN/doctor.jsonl         what the doctor found and did, with before and after; where there is one
RUN/checkpoints/step-N/  a model that any Hugging Face tool loads, and all that training needs to go on (snapshot.py)
RUN/best.json            which checkpoint has the lowest held-out loss
RUN/model/               the finished model: the averaged weights where the recipe keeps them (train.ema_decay)
"""

import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesaic.errors import CheckpointError, RunFolderError
from moesaic.hub.saving import SavesItself
from moesaic.hub.staging import replaced_folder
from moesaic.train.reports import MetricsFile
from moesaic.train.snapshot import SavedStep, Snapshot

MAY_CHANGE = frozenset({"keep_checkpoints", "keep_best", "async_checkpoints", "checkpoint_every", "doctor", "device"})
"""Fields of the recipe that a resumed run may have otherwise: they decide what is kept, or where and not what is
computed. (Another device rounds sums otherwise: what follows is then near to what would have been, not the same bits.)
The doctor may be called later, or sent away: what it does stands in its log, and what is on trial then is undone."""

DOCTORS_LOG = "doctor.jsonl"
_STEP_FOLDER = re.compile(r"step-(\d+)")
_LEFT_BEHIND = re.compile(r"\.step-\d+\.(new|old)-[0-9a-f]+")


class RunFolder:
    """The files of one run. Take it with `RunFolder.claim`, which keeps others out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextmanager
    def claim(cls, path: Path) -> Iterator["RunFolder"]:
        """Use a folder alone. Raises RunFolderError when another process does, or when it cannot be written."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("w")
        except OSError as error:
            raise RunFolderError(f"cannot write to {path}: {error.strerror}; choose another folder") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunFolderError(
                    f"{path} is in use by another run; wait for it, or choose another folder with --out"
                ) from None
            yield cls(path)

    @property
    def model(self) -> Path:
        """Where the finished model goes."""
        return self.path / "model"

    @property
    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every complete checkpoint, oldest first."""
        folders = (self.path / "checkpoints").glob("step-*")
        found = ((_STEP_FOLDER.fullmatch(folder.name), folder) for folder in folders)
        return sorted((int(step[1]), folder) for step, folder in found if step)

    def write_recipe(self, facts: dict[str, Any]) -> None:
        """Remember what the run is. Raises RunFolderError when the folder holds a run of another recipe."""
        place = self.path / "recipe.json"
        text = json.dumps(facts, indent=2)
        before = _recipe_text(place) if place.exists() else None
        if before is not None:
            refuse_differences(self.path, _parsed(place, before), facts)
        if before != text:
            write_beside(place, text)

    def open_metrics(self, up_to_step: int) -> MetricsFile:
        """metrics.jsonl for appending, without the lines of steps that will be done again."""
        return MetricsFile(self.path / "metrics.jsonl", up_to_step)

    @property
    def has_doctors_log(self) -> bool:
        """Whether a doctor has been called at any time."""
        return (self.path / DOCTORS_LOG).exists()

    def open_doctors_log(self, up_to_step: int) -> MetricsFile:
        """doctor.jsonl, in the same way."""
        return MetricsFile(self.path / DOCTORS_LOG, up_to_step)

    def newest(self) -> SavedStep | None:
        """The newest checkpoint, every byte of it verified; None in a new run.

        Raises CheckpointError when it is damaged, and says which older one is not. Going on from that one is left to
        the user: damage that nobody sees comes again.
        """
        saved = [SavedStep(step, folder) for step, folder in self.checkpoints]
        if not saved:
            return None
        damage = saved[-1].damage
        if damage is None:
            return saved[-1]
        intact = next((older for older in reversed(saved[:-1]) if older.damage is None), None)
        if intact is None:
            raise CheckpointError(f"{damage} and no older checkpoint is intact; start again in another folder")
        newer = " and ".join(str(each.folder) for each in saved if each.step > intact.step)
        raise CheckpointError(f"{damage}; delete {newer} to go on from step {intact.step}, which is intact")

    def write(self, snapshot: Snapshot, tokenizer: SavesItself | None) -> None:
        """Write a checkpoint: complete, or not there at all. Raises CheckpointError when the disk says no."""
        step = snapshot.facts["step"]
        folder = self.path / "checkpoints" / f"step-{step:06d}"
        try:
            with replaced_folder(folder, is_stale=lambda name: True) as new:
                snapshot.write(new, tokenizer)
            _sync_folder(folder.parent)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self.way_back()}") from error
        except OSError as error:
            raise CheckpointError(
                f"cannot make {folder} durable: {error.strerror or error}; {self.way_back()}"
            ) from error

    def way_back(self) -> str:
        """Where the run can go on from, in words that end a message."""
        if not self.checkpoints:
            return "there is no checkpoint yet to go on from"
        return f"the checkpoint of step {self.checkpoints[-1][0]} is there to go on from with --resume"

    def drop_old(self, *, keep_last: int, keep_best: int) -> None:
        """Delete checkpoints that are neither among the newest nor among the best, and say in best.json which is best.

        A step without an evaluation has no score. Raises RunFolderError when the disk says no.
        """
        saved = [SavedStep(step, folder) for step, folder in self.checkpoints]
        scores = {each: score for each in saved if (score := each.score) is not None}
        ranking = sorted(scores, key=lambda each: (scores[each], each.step))
        if ranking and keep_best:
            best = {"step": ranking[0].step, "held_out_bits_per_byte": scores[ranking[0]]}
            write_beside(self.path / "best.json", json.dumps(best | {"checkpoint": _name(self.path, ranking[0])}))
        for old in set(saved) - set(saved[-max(1, keep_last) :]) - set(ranking[:keep_best]):
            _remove(old.folder)

    def sweep(self) -> None:
        """Delete what a run that was killed while writing a checkpoint left behind."""
        for path in (self.path / "checkpoints").glob(".step-*"):
            if _LEFT_BEHIND.fullmatch(path.name):
                _remove(path)


def refuse_differences(run: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises RunFolderError with every field in which two descriptions of a run differ, but for `MAY_CHANGE`."""
    found = differences(old, json.loads(json.dumps(new)))
    if found:
        raise RunFolderError(
            f"{run} holds a run of another recipe: {', '.join(found)}; "
            "choose another folder with --out, or delete this one"
        )


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Every field in which two JSON trees differ, in words; the same change in many list items is said once."""
    if old == new or path.rpartition(".")[2] in MAY_CHANGE:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        parts = [
            differences(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{path}.{key}" if path else key) for key in keys
        ]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = [differences(before, after, f"{path}[*]") for before, after in zip(old, new, strict=True)]
    else:
        return [f"{path} was {_shown(old)} and is now {_shown(new)}"]
    return list(dict.fromkeys(line for part in parts for line in part))


def write_beside(place: Path, text: str) -> None:
    """Write a small file so that it is either the old one or the new one. Raises RunFolderError when it cannot be."""
    beside = place.with_name(f".{place.name}.partial")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a power cut after the rename could leave an empty file
        os.replace(beside, place)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunFolderError(
            f"cannot write {place}: {error.strerror}; free space or choose another folder with --out"
        ) from error


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def damaged_recipe(place: Path, why: object) -> RunFolderError:
    """What to say of a recipe.json that cannot be used, with the way on: the checkpoints need it no longer."""
    return RunFolderError(
        f"{place} is damaged ({why}); delete it and use --resume with --config FILE or --size as the run was "
        "started with, and with --corpus and --sweep where it had them"
    )


def _recipe_text(place: Path) -> str:
    try:
        return place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged_recipe(place, error) from error


def _parsed(place: Path, text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise damaged_recipe(place, error) from error
    if not isinstance(tree, dict):
        raise damaged_recipe(place, "it is no table")
    return tree


def _shown(value: Any) -> str:
    """A value for a message: long ones only by what they are."""
    if isinstance(value, list | dict) and len(text := repr(value)) > 60:
        return f"{text[:50]}... ({len(value)} entries)"
    return repr(value)


def _name(run: Path, saved: SavedStep) -> str:
    return saved.folder.relative_to(run).as_posix()


def _remove(folder: Path) -> None:
    """Out of sight first, so that a kill in the middle leaves nothing that looks like a checkpoint."""
    try:
        doomed = folder
        if not folder.name.startswith("."):
            doomed = folder.rename(folder.with_name(f".{folder.name}.old-{uuid.uuid4().hex[:8]}"))
        shutil.rmtree(doomed)
    except OSError as error:
        raise RunFolderError(f"cannot delete {folder}: {error.strerror}; delete it yourself") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
