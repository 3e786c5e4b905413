"""What is measured of this machine: with next to no work, since only its sense is tested."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesaic.bench import here, kernel_times, machine, probes, reached, small_times, training_here
from moesaic.bench.made_up import WIDE, made_up_config, made_up_engine
from moesaic.plan.hardware import measured_here
from moesaic.plan.rates import Speeds, measured_rates
from moesaic.plan.training_kernels import measured_training


@pytest.fixture(autouse=True)
def own_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.mark.slow
def test_kernels_are_timed_and_kept(monkeypatch):
    monkeypatch.setattr(machine, "PEAK_SIZE", 256)
    monkeypatch.setattr(probes, "_LEAST_FAR", 2**22)
    monkeypatch.setattr(probes, "_LEAST_CACHE", 2**18)
    monkeypatch.setattr(probes, "last_cache_bytes", lambda: 2**18)
    monkeypatch.setattr(here, "PASSES", 1)
    monkeypatch.setattr(small_times, "SEEN", (8, 16, 32))
    monkeypatch.setattr(small_times, "PROMPTS", (8, 16, 32))
    monkeypatch.setattr(kernel_times, "HOT_ROWS", (1, 8, 64))
    monkeypatch.setattr(kernel_times, "_SUSTAINED", 0)
    monkeypatch.setattr(here, "SETTINGS", {name: here.SETTINGS[name] for name in ("int4", "fp8")})
    found = here.measure(1)
    assert measured_rates() == found.rates and measured_here() == found.machine
    rates = found.rates
    for curves in (rates.linear, rates.latent, rates.experts, rates.fine):
        assert set(curves) == {"int4", "fp8-128"}
        for curve in curves.values():
            assert curve.rows == [1.0, 8.0, 64.0] and all(np.array(curve.cold) >= curve.hot) and curve.hot[0] > 0
    assert set(rates.head) == {"int6", "bf16"} and len(rates.sizes) == len(rates.bandwidths)
    assert set(rates.decode) == {"1", "4", "latent"} == set(rates.prompt)
    assert rates.route.layer > 0 and rates.outside.step > 0 and min(rates.decode["1"].seconds) > 0
    assert 5e7 < rates.base_bytes < 2e9  # a process that has torch in it
    assert 0 < rates.about["share"] <= 1 and rates.about["threads"] == 1


def test_samples_are_brought_to_the_speeds_of_the_run():
    """Twice as slow while memory, or the processors, gave half is no slower at all."""
    usual = kernel_times.Usual(bandwidth=10e9, compute=100.0)
    waiting = [kernel_times.Timed({"head": 2.0}, 5e9, 100.0), kernel_times.Timed({"head": 1.0}, 10e9, 100.0)]
    assert kernel_times._cold(waiting, "head", 1e-3, usual) == pytest.approx(1.0, rel=1e-5)
    computing = [kernel_times.Timed({"head": 2.0}, 10e9, 50.0), kernel_times.Timed({"head": 1.0}, 10e9, 100.0)]
    assert kernel_times._hot(computing, "head", usual) == pytest.approx(1.0)
    assert kernel_times._cold(computing, "head", 1.0, usual) == pytest.approx(1.0)
    assert kernel_times._rising([1.0, 5.0, 2.0, 3.0]) == [1.0, 2.0, 2.0, 3.0]


def test_a_row_of_scores_and_what_it_sees_are_told_apart():
    attentions = object.__new__(small_times.Attentions)
    engine = made_up_engine(made_up_config("4", 1, WIDE.near(), dense=True), threads=1)
    attentions._engines = {"4": engine}
    per_seen, own = small_times._widths(engine)
    seen = [16.0, 64.0, 256.0]
    found = attentions._scores("4", 0.0, seen, [own * 3e-9 + per_seen * each * 2e-11 for each in seen])
    assert found.row == pytest.approx(3e-9) and found.seconds == pytest.approx([2e-11] * 3)


def test_two_readings_are_apart_or_not():
    first = Speeds(20e9, 100.0, (40e9, 20e9))
    assert probes.apart(first, first) == 0 and probes.middle(first, first) == first
    assert probes.apart(first, first._replace(compute=50.0)) == pytest.approx(1.0)
    assert probes.apart(first, first._replace(bandwidth=30e9)) == pytest.approx(0.5)


def test_a_sample_between_readings_that_are_apart_is_taken_anew(monkeypatch):
    calm, other = Speeds(20e9, 100.0, (20e9,)), Speeds(40e9, 100.0, (20e9,))
    readings, seconds = iter([other, calm, calm]), iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(reached, "_sample", lambda engine, case: (next(seconds), {}))
    watched: Any = SimpleNamespace(speeds=lambda: next(readings))
    nothing: Any = None
    taken, after = reached.take_sample(nothing, watched, nothing, calm)
    assert taken.seconds == 3.0 and taken.speeds == calm == after  # the first two: 20 and 40, 40 and 20 GB/s


def test_training_steps_are_timed_and_kept(monkeypatch):
    shape = training_here.SHAPES[0]._replace(hidden=28, inner=12, layers=1, vocabulary=32, sequences=1, length=8)
    shapes = (shape, shape._replace(experts=0, top_k=1, layers=2), shape._replace(sequences=3))
    monkeypatch.setattr(training_here, "SHAPES", shapes)
    monkeypatch.setattr(training_here, "fast_bf16", lambda device: False)
    cells = [training_here._cell(each, "fp32") for each in shapes]
    monkeypatch.setattr(training_here, "_apart", lambda number, _: (1e6, training_here.take(cells[number])))
    rates = training_here.measure_training()
    assert measured_training() == rates and set(rates.seconds) == {"fp32"} == set(rates.num_bytes)
    cell = training_here._cell(shapes[2], "fp32")
    assert 0 < rates.step_seconds(cell) < 60 and rates.peak_bytes(cell) > rates.base_bytes > 0
    assert 0 < rates.share <= 1


@pytest.mark.slow
def test_a_shape_is_timed_in_a_process_of_its_own():
    start, taken = training_here._apart(3, "fp32")
    model = training_here.made_up(training_here.SHAPES[3])
    assert 5e7 < start < 2e9 and taken.seconds > 0
    assert 16 * model.total < taken.num_bytes < 2e9  # weights, gradients and both moments, in fp32
