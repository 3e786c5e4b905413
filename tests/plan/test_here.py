"""What is foretold of this machine: the arithmetic, and what is kept of it."""

from dataclasses import replace

import numpy as np
import pytest

from moesaic.bench import training_here
from moesaic.errors import ConfigError
from moesaic.plan.flops import Step
from moesaic.plan.formats import engine_formats
from moesaic.plan.hardware import Machine, find_machine
from moesaic.plan.kernels import Curve, KernelRates, engine_step
from moesaic.plan.plan import ServingPlan, make_plan
from moesaic.plan.training_kernels import TrainingCell, TrainingRates, fitted, memory_counts, time_counts
from moesaic.plan.verify import Prediction, error_table, load, store
from tests.tiny import tiny_config

LINE = Curve([1.0, 8.0, 64.0], [1e-9, 1e-9, 4e-9], [0.1e-9, 0.5e-9, 4e-9])
RATES = KernelRates(
    bandwidth=10e9, sizes=[1e6, 1e8, 1e9], bandwidths=[40e9, 10e9, 10e9], linear={"bf16": LINE, "fp32": LINE},
    experts={"bf16": LINE}, head={"bf16": LINE}, score={"1": 1e-9, "4": 5e-10, "latent": 2e-10},
    prompt_score={"1": 1e-10, "4": 1e-10, "latent": 1e-10}, norm=1e-10, row=1e-9, prompt_row=1e-9, route=1e-10,
    layer=1e-6, outside=(1e-4, 1e-5, 1e-10), base_bytes=3e8,
)  # fmt: skip


def test_a_curve_waits_for_memory_or_computes() -> None:
    """Few rows take as long as memory takes; many rows compute, however fast memory is; what is kept is hot."""
    assert float(LINE.at(1, 0.5, 0.0)) == pytest.approx(2e-9, rel=0.02)
    assert float(LINE.at(64, 0.5, 0.0)) == pytest.approx(4e-9)
    assert float(LINE.at(1, 1.0, 1.0)) == pytest.approx(0.1e-9)
    assert float(LINE.at(128, 1.0, 0.0)) == pytest.approx(8e-9)
    assert RATES.kept(1e9) == 0.0 and RATES.kept(1e5) == 1.0


def test_a_step_is_the_sum_of_its_parts() -> None:
    config = tiny_config(windows=(None, None))
    step = Step(kind="decode", texts=3, new=1, context=16)
    found = engine_step(RATES, config, engine_formats(None), step, bandwidth=10e9)
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    kept = RATES.kept(found.num_bytes)
    rows = np.arange(1, 4)
    chances = np.array([3 * 0.4 * 0.36, 3 * 0.16 * 0.6, 0.064])  # of 1, 2, 3 of three tokens choosing 2 of 5 experts
    experts = 5 * np.sum(chances * LINE.at(rows, 1.0, kept)) * 3 * 13 * 20
    assert found.parts["experts"] == pytest.approx(experts)
    assert found.parts["attention"] == pytest.approx(2 * 3 * (1e-9 * 16 * 4 * 12 + 1e-9 * (4 + 4) * 6))
    with pytest.raises(ConfigError, match="int4 were not measured"):
        engine_step(RATES, config, engine_formats(4), step)


def test_rates_say_whether_others_ran_meanwhile() -> None:
    about = {"processor": "P", "threads": 2, "isa": "avx2"}
    assert replace(RATES, about=about).machine == "P, 2 threads, avx2" and RATES.machine == ""
    assert RATES.busy is None and replace(RATES, about={"share": 0.97, "spread": 1.2}).busy is None
    assert "had 40% of the processors" in str(replace(RATES, about={"share": 0.6, "spread": 1.2}).busy)
    assert "varied 2.5-fold" in str(replace(RATES, about={"share": 1.0, "spread": 2.5}).busy)


def test_rates_are_kept_as_they_are() -> None:
    assert KernelRates.from_dict(RATES.to_dict()) == RATES


def test_least_squares_find_what_things_take() -> None:
    cells = [
        TrainingCell(config=tiny_config(windows=(None,) * layers), sequences=sequences, length=16)
        for layers in (1, 2, 4, 5)
        for sequences in (1, 3, 8)
    ]
    counts = np.array([time_counts(cell) for cell in cells])
    true = np.array([1e-10, 2e-10, 0, 0, 1e-9, 0, 1e-9, 1e-5, 1e-4])
    taken = fitted(counts, (counts @ true).tolist())
    assert counts @ np.array(taken) == pytest.approx(counts @ true, rel=1e-3)
    bytes_taken = [1.0, 1.2, 1.0, 1e6]
    rates = TrainingRates(seconds={"fp32": taken}, num_bytes={"fp32": bytes_taken}, base_bytes=2e8)
    assert rates.peak_bytes(cells[0]) == pytest.approx(2e8 + memory_counts(cells[0]) @ np.array(bytes_taken))
    with pytest.raises(ConfigError, match="bf16 was not measured"):
        rates.step_seconds(TrainingCell(config=tiny_config(), sequences=1, length=8, precision="bf16"))


def test_made_up_shapes_tell_weights_from_tokens() -> None:
    """With 8% of noise on each shape, what a step does once for each weight is still found, never taken for 0."""
    counts = np.array([time_counts(training_here._cell(shape, "fp32")) for shape in training_here.SHAPES])
    true = np.array([3.6e-11, 2.6e-11, 3.6e-11, 2.5e-10, 4e-9, 1e-9, 3.3e-9, 1e-3, 5e-3])
    per_weight = []
    for seed in range(12):
        noise = np.exp(np.random.default_rng(seed).normal(0, 0.08, len(counts)))
        taken = fitted(counts, (counts @ true * noise).tolist())
        per_weight.append((taken[5] + taken[6]) / (true[5] + true[6]))
    assert min(per_weight) > 0.3 and np.median(per_weight) == pytest.approx(1, abs=0.25)


def test_predictions_are_kept_and_added_up(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert load() == []

    def one(error: float) -> Prediction:
        return Prediction(
            source="bench", model="m", quantity="decode_s", predicted=1 + error, measured=1.0, setting={"batch": 1}
        )

    store([one(0.1)] * 15 + [one(0.3)] * 10 + [one(float("nan"))], tmp_path / "run" / "predictions.jsonl")
    (found,) = error_table(load())
    assert (found.number, found.within_20) == (25, 0.6)
    assert found.median == pytest.approx(0.1) and found.drift == pytest.approx(0.2)
    (tmp_path / "run" / "predictions.jsonl").write_text("no JSON\n")
    with pytest.raises(ConfigError, match="line 1 is no prediction"):
        load(tmp_path / "run" / "predictions.jsonl")


def test_what_the_engine_was_not_timed_in_is_said(monkeypatch):
    monkeypatch.setattr("moesaic.plan.plan.measured_rates", lambda: RATES)
    here = Machine(device=replace(find_machine("h100").device, name="here"))
    plan = make_plan("olmoe-1b-7b", machine=here, format="uneven4")
    assert isinstance(plan, ServingPlan) and isinstance(plan.engine, str)
    assert "uneven4" in plan.engine and plan.to_dict()["engine"] == plan.engine
