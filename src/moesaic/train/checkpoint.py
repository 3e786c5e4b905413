"""Checkpoints written while training goes on: a copy is taken at once, a thread brings it to disk."""

import threading
import traceback
from types import TracebackType
from typing import Any

from torch import Tensor

from moesaic.hub.saving import SavesItself
from moesaic.models.build import Model
from moesaic.train.optimizer import Optimizer
from moesaic.train.resume import RunFolder
from moesaic.train.snapshot import Snapshot


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, and drops those that need not be kept.

    With `in_background`, `save` returns as soon as everything is copied (one more time the weights and what the
    optimizer keeps, freed when it is on disk); what goes wrong in the thread is raised by the next call. As a context
    manager it waits for the last one, but leaves at once on Ctrl-C: a checkpoint is complete or not there at all.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        keep_last: int,
        keep_best: int,
        in_background: bool,
        tokenizer: SavesItself | None = None,
    ) -> None:
        self.run, self.tokenizer = run, tokenizer
        self.keep_last, self.keep_best, self.in_background = keep_last, keep_best, in_background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        model: Model,
        optimizer: Optimizer,
        facts: dict[str, Any],
        doctor_tensors: dict[str, Tensor] | None = None,
    ) -> None:
        """Write everything that the step after `facts["step"]` needs.

        Raises CheckpointError or RunFolderError when the disk says no, or said so last time; earlier checkpoints stay.
        """
        self.wait()  # before the copy: never two of them in memory
        snapshot = Snapshot.take(model, optimizer, facts, copy=self.in_background, doctor_tensors=doctor_tensors)
        if not self.in_background:
            self._write(snapshot)
            return
        # A daemon: leaving at once must not wait for the disk.
        self._thread = threading.Thread(target=self._write_in_thread, args=([snapshot],), daemon=True)
        del snapshot
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong since the last call, without waiting."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until everything is on disk. Raises what went wrong."""
        self.settle()
        self.check()

    def settle(self) -> None:
        """Until nothing is being written any more; what went wrong is raised later."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif not isinstance(error, KeyboardInterrupt):
            self.settle()
            if self._error is not None:
                error.add_note(f"the last checkpoint failed too: {self._error}")

    def _write_in_thread(self, only: list[Snapshot]) -> None:
        """`only` is emptied, since the thread object keeps its arguments alive longer than the writing takes."""
        try:
            self._write(only.pop())
        except BaseException as error:
            _let_go_of_variables(error)
            self._error = error

    def _write(self, snapshot: Snapshot) -> None:
        self.run.write(snapshot, self.tokenizer)
        self.run.drop_old(keep_last=self.keep_last, keep_best=self.keep_best)


def _let_go_of_variables(error: BaseException | None) -> None:
    """The frames of a kept error, and of those that led to it, would keep the snapshot in memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
