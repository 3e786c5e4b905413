"""The way back after a stop: the same bits, or one line that says why not."""

import dataclasses
import errno
import json
import shutil

import pytest

from moesaic.errors import CheckpointError, RunFolderError
from moesaic.models.decoder import Decoder
from moesaic.train import resume
from moesaic.train.resume import RunFolder, differences
from moesaic.train.snapshot import SavedStep
from tests.train.tiny_run import (
    BIASED,
    CONFIG,
    PACKED,
    SETTINGS,
    DrawingTrainer,
    changed,
    packed_text,
    seed_everything,
    state_of,
    trainer,
)

EVERY_STEP = changed(checkpoint_every=1, keep_checkpoints=9, micro_batches=2, selection_bias_rate=0.01)
VARIANTS = {
    "adamw": {},
    "written in line": {"async_checkpoints": False},
    "muon": {"optimizer": "muon"},
    "bf16 muon ema": {"precision": "bf16", "optimizer": "muon", "ema_decay": 0.9},
    "ema": {"ema_decay": 0.9},
    "wsd": {"schedule": "wsd", "decay_fraction": 0.5},
    "recomputed": {"recompute": "layers"},
}


def drawing(settings, **more):
    return DrawingTrainer(Decoder(BIASED).initialize(settings.seed), settings, PACKED, **more)


def metrics(folder):
    """Without what a clock or the system says."""
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "tokens_per_s", "peak_memory_bytes")
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_resumed_at_any_step_it_is_the_same_run(tmp_path, variant):
    """Whole once; then from its checkpoints (of the first two variants every one), in a copy without later ones."""
    settings = dataclasses.replace(EVERY_STEP, **variant)
    seed_everything()
    with RunFolder.claim(tmp_path / "whole") as folder:
        whole = drawing(settings, run=folder)
        whole.train()
        expected, lines = state_of(whole), metrics(folder)
    for step in range(1, settings.steps) if variant.keys() <= {"async_checkpoints"} else (2, 5):
        copy = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", copy)
        with RunFolder.claim(copy) as folder:
            for later, place in folder.checkpoints:
                if later > step:
                    shutil.rmtree(place)
            seed_everything(99)
            again = drawing(settings, run=folder)
            assert again.resume() and again.step == step
            again.train()
            assert state_of(again) == expected
            assert metrics(folder) == lines


def test_a_run_that_goes_on_and_off_is_the_same_run(tmp_path):
    """Stopped after each step, without a checkpoint folder being copied: what a person does with Ctrl-C."""
    seed_everything()
    whole = drawing(EVERY_STEP)
    whole.train()
    expected = state_of(whole)
    seed_everything()
    again = None
    for step in range(1, EVERY_STEP.steps + 1):
        with RunFolder.claim(tmp_path / "run") as folder:
            again = drawing(EVERY_STEP, run=folder, stop_after=step)
            assert again.resume() == (step > 1)
            again.train()
        seed_everything(step)
    assert again is not None
    assert {**state_of(again), "random": ""} == {**expected, "random": ""}


def test_resume_brings_back_the_best_score_and_the_metrics(tmp_path):
    with RunFolder.claim(tmp_path / "run") as folder:
        trainer(run=folder, stop_after=4).train()
        again = trainer(run=folder)
        assert again.resume() and again.seconds > 0
        again.train()
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        scores = {line["step"]: line.get("held_out_bits_per_byte") for line in lines if line["step"] % 2 == 0}
        best = json.loads((tmp_path / "run" / "best.json").read_text())
        assert best["held_out_bits_per_byte"] == min(scores.values()) == scores[best["step"]]


def test_a_new_run_has_nothing_to_resume(tmp_path):
    assert not trainer().resume()
    with RunFolder.claim(tmp_path / "run") as folder:
        assert not trainer(run=folder).resume()


def test_a_folder_in_use_is_refused(tmp_path):
    with (
        RunFolder.claim(tmp_path / "run"),
        pytest.raises(RunFolderError, match="is in use by another run"),
        RunFolder.claim(tmp_path / "run"),
    ):
        pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    with RunFolder.claim(path) as folder:
        trainer(run=folder, stop_after=4).train()
    return path


FILES = [
    "config.json", "generation_config.json", "model.safetensors", "random.json", "trainer.json",
    "trainer.safetensors", "SHA256SUMS",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_named_with_the_way_to_go_on(finished, tmp_path, name):
    run = shutil.copytree(finished, tmp_path / "run")
    with RunFolder.claim(run) as folder:
        newest = folder.checkpoints[-1][1]
        assert sorted(path.name for path in newest.iterdir()) == sorted(FILES)
        content = bytearray((newest / name).read_bytes())
        content[len(content) // 2] ^= 4
        (newest / name).write_bytes(content)
        again = trainer(run=folder)
        before = state_of(again)
        with pytest.raises(CheckpointError) as caught:
            again.resume()
        message = str(caught.value)
        assert "\n" not in message and str(newest) in message
        assert name in message or name == "SHA256SUMS"
        assert message.endswith(f"; delete {newest} to go on from step 2, which is intact")
        assert state_of(again) == before
        shutil.rmtree(newest)  # as the message says
        assert again.resume() and again.step == 2


def test_an_older_damaged_checkpoint_is_not_offered(finished, tmp_path):
    with RunFolder.claim(shutil.copytree(finished, tmp_path / "run")) as folder:
        for _, place in folder.checkpoints:
            (place / "model.safetensors").write_bytes(b"short")
        with pytest.raises(CheckpointError, match="no older checkpoint is intact; start again in another folder"):
            trainer(run=folder).resume()


OTHERS = {
    "another seed": (changed(seed=1), CONFIG, PACKED, ["train.seed was 0 and is now 1"]),
    "two fields": (
        changed(learning_rate=0.5, batch_size=2),
        CONFIG,
        PACKED,
        ["train.batch_size was 4 and is now 2", "train.learning_rate was 0.01 and is now 0.5"],
    ),
    "another model": (
        SETTINGS,
        BIASED,
        PACKED,
        [
            "model.decoder.layers[*].feed_forward.router.name was 'softmax_topk' and is now 'sigmoid_topk'",
            "model.decoder.layers[*].feed_forward.router.selection_bias was False and is now True",
        ],
    ),
    "other text": (
        SETTINGS,
        CONFIG,
        packed_text(num_tokens=1999, digest="b"),
        ["data.digest was 'a' and is now 'b'", "data.tokens.ones was 2000 and is now 1999"],
    ),
}


@pytest.mark.parametrize(("settings", "config", "packed", "lines"), OTHERS.values(), ids=OTHERS.keys())
def test_a_checkpoint_of_another_run_is_refused_with_every_difference(
    finished, tmp_path, settings, config, packed, lines
):
    run = shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with RunFolder.claim(run) as folder:
        again = trainer(settings, config, packed, run=folder)
        with pytest.raises(RunFolderError) as caught:
            again.resume()
        for line in lines:
            assert line in str(caught.value)
        assert again.step == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_is_kept_and_when_may_change(finished, tmp_path):
    with RunFolder.claim(shutil.copytree(finished, tmp_path / "run")) as folder:
        changes = {"keep_checkpoints": 1, "keep_best": 0, "async_checkpoints": False, "checkpoint_every": 1}
        again = trainer(changed(**changes), run=folder)
        assert again.resume()
        again.train()
        assert [step for step, _ in folder.checkpoints] == [6]


def test_the_recipe_of_a_folder_is_kept_and_other_ones_are_refused(tmp_path):
    with RunFolder.claim(tmp_path / "run") as folder:
        folder.write_recipe({"train": {"steps": 5, "seed": 0, "betas": (0.9, 0.95)}})
        folder.write_recipe({"train": {"steps": 5, "seed": 0, "betas": (0.9, 0.95)}})
        before = (tmp_path / "run" / "recipe.json").read_text()
        with pytest.raises(RunFolderError, match=r"recipe: train\.seed was 0 and is now 1, train\.steps was 5 and is"):
            folder.write_recipe({"train": {"steps": 6, "seed": 1, "betas": (0.9, 0.95)}})
        assert (tmp_path / "run" / "recipe.json").read_text() == before
        folder.write_recipe({"train": {"steps": 5, "seed": 0, "betas": (0.9, 0.95), "keep_best": 3}})
        assert json.loads((tmp_path / "run" / "recipe.json").read_text())["train"]["keep_best"] == 3
        for damaged in (b"{", b"", b"[]", b"caf\xe9"):
            (tmp_path / "run" / "recipe.json").write_bytes(damaged)
            with pytest.raises(
                RunFolderError, match=r"recipe\.json is damaged .*; delete it and use --resume with --c"
            ):
                folder.write_recipe({})


def test_differences_are_said_once_and_shortly():
    old = {"layers": [{"experts": 8, "width": 3}, {"experts": 8, "width": 3}], "names": list("abc"), "gone": 1}
    new = {"layers": [{"experts": 9, "width": 3}, {"experts": 9, "width": 3}], "names": ["x" * 99, "y"], "come": 2}
    found = differences(old, new)
    assert found[:2] == ["come was absent and is now 2", "gone was 1 and is now absent"]
    assert found[2] == "layers[*].experts was 8 and is now 9"
    assert len(found) == 4 and len(found[3]) < 140
    assert differences(old, old) == []


def test_optimizer_tensors_that_do_not_fit_leave_the_trainer_as_it_was(finished, tmp_path, monkeypatch):
    with RunFolder.claim(shutil.copytree(finished, tmp_path / "run")) as folder:
        again = trainer(run=folder)
        before = state_of(again)
        tensors = SavedStep.load_optimizer_tensors
        last = sorted(tensors(SavedStep(4, folder.checkpoints[-1][1])))[-1]
        for spoil in (lambda tensor: tensor[None], None):

            def spoilt(saved, spoil=spoil):
                found = tensors(saved)
                found |= {last: spoil(found[last])} if spoil else {"more": found[last]}
                return found

            monkeypatch.setattr(SavedStep, "load_optimizer_tensors", spoilt)
            with pytest.raises(CheckpointError, match="resume with the recipe that wrote it"):
                again.resume()
            assert state_of(again) == before and again.step == 0


def test_a_checkpoint_whose_folder_cannot_be_made_durable_is_one_line(tmp_path, monkeypatch):
    def refuse(folder):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(resume, "_sync_folder", refuse)
    with RunFolder.claim(tmp_path / "run") as folder, pytest.raises(CheckpointError, match="durable: Input/output err"):
        trainer(run=folder).train()


def test_folders_that_are_no_checkpoints_are_left_alone(finished, tmp_path):
    with RunFolder.claim(shutil.copytree(finished, tmp_path / "run")) as folder:
        (folder.path / "checkpoints" / "step-best").mkdir()
        assert [step for step, _ in folder.checkpoints] == [2, 4]
        assert trainer(run=folder).resume()
