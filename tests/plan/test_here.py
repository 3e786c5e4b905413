"""What is foretold of this machine: the arithmetic, and what is kept of it."""

from dataclasses import replace

import numpy as np
import pytest

from moesaic.bench import training_here
from moesaic.errors import ConfigError
from moesaic.plan.flops import Step
from moesaic.plan.formats import engine_formats
from moesaic.plan.hardware import Machine, find_machine
from moesaic.plan.kernels import engine_step
from moesaic.plan.plan import ServingPlan, make_plan
from moesaic.plan.rates import Curve, KernelRates, Outside, Pace, Routes, Scores, Speeds
from moesaic.plan.training_kernels import TrainingCell, TrainingRates, fitted, memory_counts, time_counts
from moesaic.plan.verify import Prediction, error_table, load, store
from tests.tiny import tiny_config

LINE = Curve([1.0, 8.0, 64.0], [1e-9, 1e-9, 4e-9], [0.1e-9, 0.5e-9, 4e-9])
THIN = Curve([1.0, 8.0, 64.0], [2e-9, 2e-9, 8e-9], [0.2e-9, 1e-9, 8e-9])
SCORES = Scores(layer=1e-6, row=1e-9, seen=[16.0, 64.0], seconds=[1e-9, 3e-9])
RATES = KernelRates(
    bandwidth=10e9, compute=100.0, sizes=[1e6, 2e6, 1e8, 1e9], bandwidths=[40e9, 40e9, 10e9, 10e9],
    linear={"bf16": LINE, "fp32": LINE}, latent={"bf16": LINE}, experts={"bf16": LINE}, fine={"bf16": THIN},
    head={"bf16": LINE}, slender=(0.001, 0.005), decode={"1": SCORES, "4": SCORES, "latent": SCORES},
    prompt={"1": SCORES, "4": SCORES, "latent": SCORES}, norm=(1e-6, 1e-10), route=Routes(1e-5, 1e-10, 1e-6, 1e-10),
    outside=Outside(1e-4, 1e-5, 1e-6, 1e-10), base_bytes=3e8,
)  # fmt: skip
USUAL = Pace(1.0, 1.0)


def test_a_curve_waits_for_memory_or_computes() -> None:
    """Few rows take as long as memory takes; many rows compute, however fast memory is; what is kept is hot."""
    slow_memory, slow_processors = Pace(0.5, 1.0), Pace(1.0, 0.5)
    assert float(LINE.at(1, slow_memory, 0.0)) == pytest.approx(2e-9, rel=0.02)
    assert float(LINE.at(1, slow_processors, 0.0)) == pytest.approx(1e-9, rel=0.02)
    assert float(LINE.at(64, slow_memory, 0.0)) == pytest.approx(4e-9)
    assert float(LINE.at(64, slow_processors, 0.0)) == pytest.approx(8e-9)
    assert float(LINE.at(1, USUAL, 1.0)) == pytest.approx(0.1e-9)
    assert float(LINE.at(1, slow_processors, 1.0)) == pytest.approx(0.2e-9)
    assert float(LINE.at(128, USUAL, 0.0)) == pytest.approx(8e-9)
    assert RATES.kept(1e9) == 0.0 and RATES.kept(1e5) == 1.0


def test_what_a_cache_keeps_is_read_from_what_it_gives_now() -> None:
    now = Speeds(bandwidth=10e9, compute=100.0, near=(40e9, 40e9, 40e9, 10e9))
    assert RATES.kept(5e7, now) == 1.0 and RATES.kept(5e7) < 0.5
    assert RATES.kept(5e7, now._replace(near=(10e9,) * 4)) == 0.0


def test_a_step_is_the_sum_of_its_parts() -> None:
    config = tiny_config(windows=(None, None))
    step = Step(kind="decode", texts=3, new=1, context=16)
    now = Speeds(bandwidth=10e9, compute=100.0, near=(10e9,) * 4)  # no cache
    found = engine_step(RATES, config, engine_formats(None), step, speeds=now)
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    chances = np.array([3 * 0.4 * 0.36, 3 * 0.16 * 0.6, 0.064])  # of 1, 2, 3 of three tokens choosing 2 of 5 experts
    experts = (
        5 * np.sum(chances * THIN.at(np.arange(1, 4), USUAL, 0.0)) * 3 * 13 * 20
    )  # narrow: 46 outputs, 780 weights
    assert found.parts["experts"] == pytest.approx(experts)
    assert found.parts["attention"] == pytest.approx(2 * (1e-6 + 3 * (1e-9 * 16 * 4 * 12 + 1e-9 * (4 + 4) * 6)))
    assert found.parts["outside kernels"] == pytest.approx(1e-4 + 3 * (1e-5 + 1e-10 * 61))
    slow = engine_step(RATES, config, engine_formats(None), step, speeds=now._replace(compute=50.0))
    assert slow.parts["attention"] == pytest.approx(2 * found.parts["attention"])
    with pytest.raises(ConfigError, match="int4 were not measured"):
        engine_step(RATES, config, engine_formats(4), step)


def test_experts_stay_in_a_cache_less_than_what_every_step_reads() -> None:
    """A step chooses a few of many experts: when they are chosen again, others have pushed them out."""
    config = tiny_config(windows=(None, None))
    num_bytes = engine_step(
        RATES, config, engine_formats(None), Step(kind="decode", texts=1, new=1, context=4)
    ).num_bytes
    small = replace(RATES, sizes=[num_bytes / 4, num_bytes / 2, num_bytes * 1.01, num_bytes * 1.02])
    near = Speeds(10e9, 100.0, (40e9, 40e9, 40e9, 10e9))
    step = Step(kind="decode", texts=1, new=1, context=4)
    some = engine_step(small, config, engine_formats(None), step, speeds=near)
    none = engine_step(small, config, engine_formats(None), step, speeds=near._replace(near=(10e9,) * 4))
    hot = LINE.at(1, USUAL, 1.0) / LINE.at(1, USUAL, 0.0)
    assert some.parts["head"] == pytest.approx(none.parts["head"] * hot)
    assert some.parts["experts"] > 1.5 * none.parts["experts"] * hot


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
