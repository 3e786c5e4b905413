"""Writing checkpoints: in the background or not, on a full disk, and which of them stay."""

import gc
import json
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest

from moesaic.errors import CheckpointError
from moesaic.hub import saving
from moesaic.train.checkpoint import CheckpointWriter
from moesaic.train.resume import RunFolder
from moesaic.train.snapshot import Snapshot
from tests.full_disk import full_disk
from tests.train.tiny_run import changed, raw_bytes, state_of, trainer


@pytest.fixture
def folder(tmp_path):
    with RunFolder.claim(tmp_path / "run") as folder:
        yield folder


def writer(folder, **more):
    return CheckpointWriter(folder, **({"keep_last": 2, "keep_best": 1, "in_background": True} | more))


def files(folder: RunFolder) -> dict[str, bytes]:
    paths = (path for path in (folder.path / "checkpoints").rglob("*") if path.is_file())
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in paths}


def save(writing, run, step, score=None):
    writing.save(run.model, run.optimizer, {"step": step, "held_out_bits_per_byte": score})


def test_what_is_saved_is_the_moment_of_the_call(folder, monkeypatch):
    """The thread starts to write only when training has gone on: the files must not know."""
    may_write = threading.Event()
    write = Snapshot.write
    monkeypatch.setattr(Snapshot, "write", lambda *args: may_write.wait(30) and write(*args))
    run = trainer()
    run.train_step()
    with writer(folder) as writing:
        before = state_of(run)
        writing.save(run.model, run.optimizer, {"step": 1})
        run.train_step()
        assert state_of(run) != before
        may_write.set()
    saved = folder.newest()
    assert saved is not None
    for name, tensor in {**saved.load_weights(), **saved.load_optimizer_tensors()}.items():
        assert before[name][1] == raw_bytes(tensor), name


def test_both_ways_write_the_same_files(tmp_path):
    run = trainer()
    run.train_step()
    found = []
    for in_background in (True, False):
        with RunFolder.claim(tmp_path / str(in_background)) as folder:
            with writer(folder, in_background=in_background) as writing:
                save(writing, run, 1)
            found.append(files(folder))
    assert found[0] == found[1]
    assert {Path(name).name for name in found[0]} >= {"SHA256SUMS", "model.safetensors", "trainer.safetensors"}


def test_never_two_writes_at_once(folder, monkeypatch):
    running, most = [], []
    write = Snapshot.write

    def slow(*args):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        write(*args)
        running.pop()

    monkeypatch.setattr(Snapshot, "write", slow)
    run = trainer()
    run.train_step()
    with writer(folder) as writing:
        for step in range(1, 5):
            save(writing, run, step)
    assert most == [1, 1, 1, 1]
    assert [step for step, _ in folder.checkpoints] == [3, 4]


@pytest.mark.parametrize("fails", [False, True])
def test_the_copy_is_freed_when_it_is_written(folder, monkeypatch, fails):
    copies = []
    take = Snapshot.take

    def remember(*args, **more):
        snapshot = take(*args, **more)
        copies.extend(map(weakref.ref, [snapshot.model, *snapshot.optimizer_tensors.values()]))
        return snapshot

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Snapshot, "take", remember)
    if fails:
        monkeypatch.setattr(saving, "_write_safetensors", full)
    run = trainer()
    run.train_step()
    writing = writer(folder)
    save(writing, run, 1)
    assert writing._thread is not None
    writing._thread.join()
    gc.collect()
    assert copies and not any(copy() is not None for copy in copies)
    if fails:
        with pytest.raises(CheckpointError, match="No space left on device"):
            writing.wait()


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("room_bytes", [0, 1_000, 30_000, 60_000])
def test_a_full_disk_leaves_the_earlier_checkpoints(folder, in_background, room_bytes):
    run = trainer(changed(async_checkpoints=in_background), run=folder, stop_after=2)
    run.train()
    before = files(folder)
    with writer(folder, in_background=in_background) as writing:
        with full_disk(room_bytes), pytest.raises(CheckpointError) as caught:
            save(writing, run, 3)
            writing.wait()
        assert files(folder) == before
        message = str(caught.value)
        assert "step-000003: File too large" in message and "\n" not in message
        assert "the checkpoint of step 2 is there to go on from with --resume" in message
        save(writing, run, 3)  # there is room again
    assert [step for step, _ in folder.checkpoints] == [2, 3]


def test_an_error_in_the_background_comes_up_in_the_run(folder, monkeypatch):
    run = trainer(changed(steps=100, checkpoint_every=3), run=folder)

    def full(*args):
        raise OSError(28, "No space left on device")

    def wait_for_thread(report, evaluation):
        time.sleep(0.01)

    monkeypatch.setattr(saving, "_write_safetensors", full)
    with pytest.raises(CheckpointError, match="there is no checkpoint yet"):
        run.train(wait_for_thread)
    assert run.step <= 6  # at the next checkpoint at the latest
    assert folder.checkpoints == [] and files(folder) == {}


def test_an_error_in_training_waits_for_the_checkpoint_before(folder, monkeypatch):
    write = Snapshot.write
    monkeypatch.setattr(Snapshot, "write", lambda *args: time.sleep(0.2) or write(*args))
    run = trainer()
    run.train_step()
    with pytest.raises(RuntimeError, match="something else"), writer(folder) as writing:
        save(writing, run, 1)
        raise RuntimeError("something else")
    assert [step for step, _ in folder.checkpoints] == [1]


def test_ctrl_c_does_not_wait_for_the_disk(folder, monkeypatch):
    may_end = threading.Event()
    monkeypatch.setattr(Snapshot, "write", lambda *args: may_end.wait(30))
    run = trainer()
    writing = writer(folder)
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), writing:
        save(writing, run, 1)
        raise KeyboardInterrupt
    assert time.perf_counter() - started < 10
    assert folder.checkpoints == []
    may_end.set()
    writing.wait()


SCORES = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5, 6: 1.0}


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "left", "best"),
    [
        (1, 0, [6], None),
        (2, 0, [5, 6], None),
        (1, 1, [2, 6], 2),
        (2, 3, [2, 3, 5, 6], 2),
        (9, 1, [1, 2, 3, 4, 5, 6], 2),
    ],
)
def test_the_newest_and_the_best_stay(folder, keep_last, keep_best, left, best):
    run = trainer()
    with writer(folder, keep_last=keep_last, keep_best=keep_best) as writing:
        for step, score in SCORES.items():
            save(writing, run, step, score)
    assert [step for step, _ in folder.checkpoints] == left
    place = folder.path / "best.json"
    assert place.exists() == (best is not None)
    if best is not None:
        facts = json.loads(place.read_text())
        assert facts == {
            "step": best,
            "held_out_bits_per_byte": SCORES[best],
            "checkpoint": f"checkpoints/step-{best:06}",
        }
        assert (folder.path / facts["checkpoint"] / "model.safetensors").exists()


def test_the_checkpoint_that_was_resumed_from_stays_until_a_newer_one_is_there(folder, monkeypatch):
    trainer(changed(keep_checkpoints=1, keep_best=0), run=folder, stop_after=2).train()
    again = trainer(changed(keep_checkpoints=1, keep_best=0), run=folder)
    assert again.resume()
    seen = []
    write = Snapshot.write

    def look(*args):
        seen.append([step for step, _ in folder.checkpoints])
        write(*args)

    monkeypatch.setattr(Snapshot, "write", look)
    again.train()
    assert seen == [[2], [4]]
    assert [step for step, _ in folder.checkpoints] == [6]


def test_what_a_killed_writer_left_is_swept_and_nothing_else(folder):
    run = trainer(run=folder, stop_after=2)
    run.train()
    checkpoints = folder.path / "checkpoints"
    for name in (".step-000004.new-0123abcd", ".step-000002.old-0123abcd", ".step-notes", "mine"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "model.safetensors").write_bytes(b"half")
    folder.sweep()
    assert sorted(path.name for path in checkpoints.iterdir()) == [".step-notes", "mine", "step-000002"]


def test_signals_of_the_file_size_limit_are_not_ours():
    """`full_disk` needs the system to answer with an error and not with a signal."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
