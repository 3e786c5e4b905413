"""All that a run's folder says now, read again whenever somebody asks."""

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

from moesaic.errors import DataError, RunFolderError
from moesaic.telemetry.scale import duration
from moesaic.telemetry.watching.follower import Follower
from moesaic.telemetry.watching.progress import Progress

LOOK_EVERY_S = 0.5  # at the files, however many ask
QUIET_S = 60.0  # without a step, or as long as twenty of them, whichever is longer


class WatchedRun:
    """A run that may be about to begin, on its way, stopped, taken up again, or over.

    Raises RunFolderError for a folder that is not there or holds a sweep.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / "sweep.json").exists():
            raise RunFolderError(f"{folder} holds a sweep; name one of the folders in it, each is a run")
        if not folder.is_dir():
            raise RunFolderError(f"no folder {folder}; name the one that `moesaic train --out` writes")
        if not (folder / "recipe.json").exists() and not (folder / ".lock").exists():
            raise RunFolderError(
                f"{folder} is no run's folder: it has no recipe.json; name the one of `moesaic train --out`"
            )
        self._follower, self._progress = Follower(folder / "metrics.jsonl"), Progress()
        self._lock = threading.Lock()
        self._looked = self._grew = -1e9
        self.version, self.unreadable, self.restarts = 0, 0, 0
        self._trouble = ""
        self._tree: dict[str, Any] = {}
        self._of_version = -1

    def state(self, known_version: int = -1) -> dict[str, Any]:
        """JSON-ready: where the run stands, and its curves unless version `known_version` has them already."""
        with self._lock:
            self._look()
            if self._of_version != self.version:
                self._tree, self._of_version = self._progress.to_json(), self.version
            standing = self._standing()
            return {**standing, "version": self.version, "run": None if known_version == self.version else self._tree}

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        try:
            lines, is_anew = self._follower.read()
            self._trouble = ""
        except OSError as error:
            self._trouble = f"metrics.jsonl cannot be read: {error.strerror or error}"
            return
        if is_anew:
            self._progress, self.unreadable = Progress(), 0
            self.restarts += 1
        for line in lines:
            self._add(line)
        if lines:
            self._grew = now if self.version else now - self._age_s()
        if lines or is_anew:
            self.version += 1

    def _add(self, line: bytes) -> None:
        try:
            self._progress.add(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, DataError):
            self.unreadable += 1

    def _age_s(self) -> float:
        """Since the file was last written to, as this machine's clock has it."""
        try:
            return max(0.0, time.time() - (self.folder / "metrics.jsonl").stat().st_mtime)
        except OSError:
            return 0.0

    def _standing(self) -> dict[str, Any]:
        model, train = self._recipe("model"), self._recipe("train")
        step, num_steps = int(self._progress.last.get("step", 0)), train.get("steps")
        num_steps = num_steps if isinstance(num_steps, int) else None
        seconds = self._progress.last.get("seconds", 0.0)
        seconds = seconds if math.isfinite(seconds) else 0.0
        left = None
        if num_steps and step and num_steps > step:
            left = seconds / step * (num_steps - step)
        status, text = self._status(step, num_steps, seconds)
        return {
            "name": self.folder.resolve().name,
            "folder": str(self.folder),
            "family": model.get("model_type"),
            "step": step,
            "num_steps": num_steps,
            "seconds": seconds,
            "seconds_left": left if status == "running" else None,
            "status": status,
            "status_text": text,
            "restarts": self.restarts,
            "unreadable": self.unreadable,
        }

    def _status(self, step: int, num_steps: int | None, seconds: float) -> tuple[str, str]:
        if self._trouble:
            return "trouble", self._trouble
        if not step:
            return "waiting", "waiting for the first step"
        if num_steps and step >= num_steps:
            return "finished", "finished" if (self.folder / "model").is_dir() else "the last step is done"
        silent_s = time.monotonic() - self._grew
        if silent_s > max(QUIET_S, 20 * seconds / step):
            return "quiet", f"no step for {duration(silent_s)}: it stopped, or something takes long"
        return "running", "training"

    def _recipe(self, table: str) -> dict[str, Any]:
        """A table of recipe.json; nothing where that is not there yet, just being written, or no recipe."""
        try:
            found = json.loads((self.folder / "recipe.json").read_text(encoding="utf-8"))["recipe"][table]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}
