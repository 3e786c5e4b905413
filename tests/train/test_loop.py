"""The loop on a small made-up corpus: what it must not change, what it says, and how it stops."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from moesaic.errors import MoesaicError, RunFolderError
from moesaic.evaluate.perplexity import held_out_loss
from moesaic.models.build import decoder_only
from moesaic.train.interrupt import Interrupted, stop_on_signals
from moesaic.train.profile import StepProfiler
from moesaic.train.resume import RunFolder
from moesaic.train.twins import dense_twin
from tests.tiny import tiny_config
from tests.train.tiny_run import BIASED, CONFIG, PACKED, SETTINGS, changed, seed_everything, state_of, trainer

NOISY = tiny_config(windows=(None, None), router="noisy_topk")


def test_it_learns():
    history = trainer(changed(steps=60, warmup_steps=5, evaluate_every=60, checkpoint_every=60)).train()
    before, after = history.evaluations[0].loss, history.evaluations[-1].loss
    assert after.bits_per_byte < 0.5 * before.bits_per_byte
    assert set(after.by_domain) == {"ones", "threes"}


def test_the_same_seed_twice_gives_the_same_bits():
    first, second = trainer(), trainer()
    first.train()
    second.train()
    assert state_of(first) == state_of(second)


def test_noise_belongs_to_the_seed():
    runs = [trainer(changed(seed=seed), config=NOISY) for seed in (0, 0, 1)]
    losses = []
    for run in runs:
        torch.rand(3)
        losses.append([report.loss for report in run.train().steps])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("in_background", [True, False])
def test_who_listens_and_what_is_written_changes_no_bit(tmp_path, in_background):
    """Alone in memory, and with metrics, checkpoints, and listeners that draw random numbers."""

    def draws(report, evaluation):
        seed_everything(report.step)

    settings = changed(checkpoint_every=1, async_checkpoints=in_background)
    alone, watched = trainer(settings, BIASED), None
    seed_everything()
    alone.train()
    expected = state_of(alone)
    seed_everything()
    with RunFolder.claim(tmp_path / "run") as folder:
        watched = trainer(settings, BIASED, run=folder)
        watched.train(draws, None, draws)
    assert state_of(watched) == expected


def test_recording_and_profiling_change_no_bit(tmp_path):
    plain, unheard, profiled = trainer(), trainer(), trainer()
    unheard.recorder = None
    plain.train()
    assert unheard.train().steps[-1].load.layers == ()
    with StepProfiler(profiled, tmp_path / "trace.json.gz", 2):
        profiled.train()
    assert state_of(plain) == state_of(unheard) == state_of(profiled)


def test_the_average_of_the_weights_is_evaluated_and_is_what_the_run_is_for(tmp_path):
    settings = changed(ema_decay=0.8, keep_best=0)
    with RunFolder.claim(tmp_path / "run") as folder:
        run = trainer(settings, run=folder)
        before = run.train().evaluations[-1]
        lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    plain = trainer(changed(keep_best=0))
    assert before.loss == plain.train().evaluations[-1].loss  # keeping an average changes no weight
    assert before.ema_loss is not None and before.ema_loss != before.loss
    assert json.loads(lines[-1])["ema_held_out_bits_per_byte"] == before.ema_loss.bits_per_byte
    final = decoder_only(run.final_model(), "a test")
    again = held_out_loss(final, PACKED, sequence_length=16, max_tokens=64, document_attention=True)
    assert again == before.ema_loss
    assert plain.final_model() is plain.model


def test_micro_batches_change_neither_the_loss_nor_its_gradient():
    """The same 8 sequences as one batch and as four: cross-entropy and z-loss are means over tokens, so both agree."""
    z_only = changed(balance_losses=(("router_z", 0.1),), clip_norm=1e9, batch_size=8)
    whole, parts = trainer(z_only), trainer(dataclasses.replace(z_only, batch_size=2, micro_batches=4))
    first, second = whole.train_step(), parts.train_step()
    assert first.tokens == second.tokens
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    assert first.balance["router_z"] == pytest.approx(second.balance["router_z"], rel=1e-5)
    assert first.gradient_norm == pytest.approx(second.gradient_norm, rel=1e-4)


def test_a_load_is_that_of_the_whole_step():
    report = trainer(changed(micro_batches=3)).train_step()
    (layer,) = report.load.layers
    assert layer.counts_E.sum() == 3 * 4 * 16 * 2
    assert layer.domain_counts_ME is not None
    assert (layer.domain_counts_ME.sum(0) == layer.counts_E).all()


def test_selection_biases_move_once_a_step_and_stay_out_of_the_optimizer():
    run = trainer(changed(selection_bias_rate=0.25, micro_batches=2, balance_losses=()), BIASED)
    report = run.train_step()
    bias = run.model.state_dict()["layers.0.feed_forward.router.selection_bias"]
    counts = torch.from_numpy(report.load.layers[0].counts_E).float()
    assert torch.equal(bias, 0.25 * torch.sign(counts.mean() - counts))


def test_a_dense_model_trains_with_the_same_settings():
    assert trainer().train_step().balance
    dense = trainer(config=dense_twin(CONFIG, "active")).train_step()
    assert dense.balance == {} and dense.load.layers == ()


def test_a_step_says_how_fast_it_was_and_what_memory_it_took():
    report = trainer().train_step()
    assert report.tokens == 64 and report.tokens_per_s == pytest.approx(64 / report.seconds)
    assert report.peak_memory_bytes > 50e6  # torch alone


def test_every_listener_hears_every_step_and_its_evaluation(tmp_path):
    heard = []
    with RunFolder.claim(tmp_path / "run") as folder:
        history = trainer(run=folder, keep_reports=2).train(
            lambda report, evaluation: heard.append((report.step, evaluation is not None)),
            lambda report, evaluation: heard.append(report.loss),
        )
    steps = [item for item in heard if isinstance(item, tuple)]
    # At 3 and 6 by evaluate_every; 2, 4 and 6 are checkpoints.
    assert steps == [(1, False), (2, True), (3, True), (4, True), (5, False), (6, True)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [item for item in heard if isinstance(item, float)]
    assert [line["step"] for line in lines if "held_out_bits_per_byte" in line] == [2, 3, 4, 6]
    assert [report.step for report in history.steps] == [5, 6]
    assert len(history.evaluations) == 5


def test_a_weight_that_is_not_a_number_stops_the_run_and_is_located(tmp_path):
    with RunFolder.claim(tmp_path / "run") as folder:
        run = trainer(changed(keep_best=0), run=folder)

        def poison(report, evaluation):
            if report.step == 3:
                with torch.no_grad():
                    run.model.get_parameter("layers.1.feed_forward.down_proj.weight")[0, 0] = torch.nan

        with pytest.raises(MoesaicError) as caught:
            run.train(poison)
        message = str(caught.value)
        assert "at step 4: layers.1.feed_forward" in message and "step 4" in message and "\n" not in message
        assert f"the last good checkpoint is {folder.checkpoints[-1][1]};" in message
        assert [step for step, _ in folder.checkpoints] == [2]


def test_a_broken_model_is_not_saved(tmp_path):
    with RunFolder.claim(tmp_path / "run") as folder:
        run = trainer(changed(keep_best=0, keep_checkpoints=1), run=folder)

        def poison(report, evaluation):
            if report.step == 4:
                with torch.no_grad():
                    run.model.get_parameter("layers.0.feed_forward.experts.down")[3, 0, 0] = torch.inf

        with pytest.raises(MoesaicError, match=r"layers\.0\.feed_forward\.experts\.down is not finite after step 4"):
            run.train(poison)
        assert [step for step, _ in folder.checkpoints] == [2]


def test_without_a_folder_a_loss_that_is_not_a_number_says_so():
    run = trainer()
    with torch.no_grad():
        run.model.embedding.weight[:] = torch.nan
    with pytest.raises(MoesaicError, match="nan"):
        run.train_step()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_request_to_stop_finishes_the_step_and_saves_it(tmp_path, number):
    said = []
    before = signal.getsignal(number)
    with RunFolder.claim(tmp_path / "run") as folder:
        run = trainer(run=folder, say=said.append)
        with pytest.raises(Interrupted, match="stopped after step 3 of 6; the checkpoint of step 3 is there"):
            run.train(lambda report, evaluation: os.kill(os.getpid(), number) if report.step == 3 else None)
        assert [step for step, _ in folder.checkpoints] == [2, 3]
        assert folder.newest() is not None
    assert signal.getsignal(number) is before
    assert len(said) == 1 and "once more" in said[0]


def test_the_second_ctrl_c_is_an_ordinary_one(tmp_path):
    def twice(report, evaluation):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with RunFolder.claim(tmp_path / "run") as folder:
        with pytest.raises(KeyboardInterrupt) as caught:
            trainer(run=folder).train(twice)
        assert not isinstance(caught.value, Interrupted)
        assert folder.checkpoints == []


def test_signals_belong_to_the_main_thread(tmp_path):
    """In another thread nothing is installed, and training works."""
    found = []

    def work():
        with stop_on_signals():
            found.append(signal.getsignal(signal.SIGINT))
        with RunFolder.claim(tmp_path / "run") as folder:
            trainer(run=folder).train()
            found.append([step for step, _ in folder.checkpoints])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT), [4, 6]]


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not stop.is_made
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


INTERRUPTED_RUN = """
import sys
from pathlib import Path
from moesaic.train.profile import StepProfiler
from moesaic.train.resume import RunFolder
from tests.train.tiny_run import changed, trainer

with RunFolder.claim(Path(sys.argv[1])) as folder:
    run = trainer(changed(steps=100_000, checkpoint_every=100_000), run=folder, keep_reports=1)
    run.train(lambda report, evaluation: print(report.step, flush=True))
"""


def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED_RUN, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    last = int((first + out).split()[-1])
    assert process.returncode != 0 and f"stopped after step {last} of 100000" in err
    with RunFolder.claim(tmp_path / "run") as folder:
        again = trainer(changed(steps=100_000, checkpoint_every=100_000), run=folder)
        assert again.resume()
        assert again.step == last


def test_a_new_run_does_not_write_into_an_old_one(tmp_path):
    with RunFolder.claim(tmp_path / "run") as folder:
        trainer(run=folder).train()
        with pytest.raises(RunFolderError, match="holds a run at step 6 and this one is at step 0; resume it"):
            trainer(run=folder).train()


def test_stop_after_keeps_the_schedule():
    assert trainer(stop_after=2).train().steps[-1].learning_rate == trainer().train().steps[1].learning_rate
    assert SETTINGS.steps == 6
