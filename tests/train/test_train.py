"""The loop on a small made-up corpus: what it must not change, and what it must bring back."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from moesaic.data.loader import Packed, PackedDomain
from moesaic.errors import CheckpointError, MoesaicError, RunFolderError
from moesaic.models.decoder import Decoder
from moesaic.train import resume
from moesaic.train.loop import Trainer
from moesaic.train.recipe import TrainSettings
from moesaic.train.resume import RunFolder
from tests.tiny import tiny_config

SETTINGS = TrainSettings(
    steps=6,
    batch_size=4,
    sequence_length=16,
    warmup_steps=2,
    learning_rate=1e-2,
    evaluate_every=3,
    checkpoint_every=2,
    evaluate_tokens=64,
)
CONFIG = tiny_config(windows=(None, None))


def packed_text(num_tokens=2000):
    """Two domains with different habits: counting up by one, and by three."""

    def domain(name, stride):
        ids = (np.arange(num_tokens) * stride % 60 + 1).astype(np.uint16)
        return PackedDomain(name=name, train=ids, held_out=ids[:200], held_out_bytes=199)

    return Packed(domains=(domain("ones", 1), domain("threes", 3)), byte_lengths=np.ones(61, dtype=np.int64), eos_id=0)


PACKED = packed_text()


def trainer(settings=SETTINGS, config=CONFIG, **more):
    return Trainer(Decoder(config).initialize(settings.seed), settings, PACKED, **more)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_it_learns():
    settings = dataclasses.replace(SETTINGS, steps=60, warmup_steps=5, evaluate_every=60, checkpoint_every=60)
    history = trainer(settings).train()
    before, after = history.evaluations[0].loss, history.evaluations[-1].loss
    assert after.bits_per_byte < 0.5 * before.bits_per_byte
    assert set(after.by_domain) == {"ones", "threes"}


def test_the_same_seed_twice_gives_the_same_bits():
    first, second = trainer(), trainer()
    first.train()
    second.train()
    assert same(weights(first.model), weights(second.model))


def test_micro_batches_change_neither_the_loss_nor_its_gradient():
    """The same 8 sequences as one batch and as four: cross-entropy and z-loss are means over tokens, so both agree."""
    z_only = dataclasses.replace(SETTINGS, balance_losses=(("router_z", 0.1),), clip_norm=1e9, batch_size=8)
    whole, parts = trainer(z_only), trainer(dataclasses.replace(z_only, batch_size=2, micro_batches=4))
    first, second = whole.train_step(), parts.train_step()
    assert first.tokens == second.tokens
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    assert first.balance["router_z"] == pytest.approx(second.balance["router_z"], rel=1e-5)
    assert first.gradient_norm == pytest.approx(second.gradient_norm, rel=1e-4)


def test_a_load_is_that_of_the_whole_step():
    report = trainer(dataclasses.replace(SETTINGS, micro_batches=3)).train_step()
    (layer,) = report.load.layers
    assert layer.counts_E.sum() == 3 * 4 * 16 * 2
    assert layer.domain_counts_ME is not None
    assert (layer.domain_counts_ME.sum(0) == layer.counts_E).all()


def test_selection_biases_move_once_a_step_and_stay_out_of_the_optimizer():
    config = tiny_config(windows=(None, None), router="sigmoid_topk", selection_bias=True)
    settings = dataclasses.replace(SETTINGS, selection_bias_rate=0.25, micro_batches=2, balance_losses=())
    run = trainer(settings, config)
    report = run.train_step()
    bias = run.model.state_dict()["layers.0.feed_forward.router.selection_bias"]
    counts = torch.from_numpy(report.load.layers[0].counts_E).float()
    assert torch.equal(bias, 0.25 * torch.sign(counts.mean() - counts))


def test_a_dense_model_trains_with_the_same_settings():
    report = trainer(config=tiny_config(windows=(None, None)), settings=SETTINGS).train_step()
    assert report.balance
    from moesaic.train.twins import dense_twin

    dense = trainer(config=dense_twin(CONFIG, "active")).train_step()
    assert dense.balance == {} and dense.load.layers == ()


def test_resume_brings_back_the_same_bits(tmp_path):
    whole = trainer()
    whole.train()
    with RunFolder.claim(tmp_path / "run") as folder:
        trainer(run=folder, stop_after=4).train()
    with RunFolder.claim(tmp_path / "run") as folder:
        again = Trainer(Decoder(CONFIG).initialize(99), SETTINGS, PACKED, run=folder)
        assert again.resume()
        assert again.step == 4
        again.train()
    assert same(weights(whole.model), weights(again.model))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in folder.checkpoints] == [4, 6]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with RunFolder.claim(tmp_path / "run") as folder:
        run = trainer(run=folder, stop_after=2)
        run.train()
        monkeypatch.setattr(resume, "save_file", full)
        run.stop_after = 4
        with pytest.raises(CheckpointError, match="No space left on device"):
            run.train()
        assert [step for step, _ in folder.checkpoints] == [2]
        assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["step-000002"]


def test_a_folder_in_use_is_refused(tmp_path):
    with (
        RunFolder.claim(tmp_path / "run"),
        pytest.raises(RunFolderError, match="is in use by another run"),
        RunFolder.claim(tmp_path / "run"),
    ):
        pass


def test_a_folder_of_another_recipe_is_refused_and_the_difference_named(tmp_path):
    with RunFolder.claim(tmp_path / "run") as folder:
        folder.write_recipe({"train": {"steps": 5, "seed": 0}})
        folder.write_recipe({"train": {"steps": 5, "seed": 0}})
        with pytest.raises(RunFolderError, match=r"train\.seed was 0 and is now 1"):
            folder.write_recipe({"train": {"steps": 5, "seed": 1}})


def test_a_damaged_checkpoint_is_named(tmp_path):
    with RunFolder.claim(tmp_path / "run") as folder:
        trainer(run=folder, stop_after=2).train()
        (folder.checkpoints[-1][1] / resume.TRAINER_TENSORS).write_bytes(b"short")
        with pytest.raises(CheckpointError, match="delete it to go on from the one before"):
            trainer(run=folder).resume()


def test_a_loss_that_is_not_a_number_stops_the_run():
    run = trainer()
    with torch.no_grad():
        run.model.embedding.weight[:] = torch.nan
    with pytest.raises(MoesaicError, match="the loss is nan"):
        run.train_step()
