"""What is measured of this machine: with next to no work, since only its sense is tested."""

import pytest

from moesaic.bench import here, machine, training_here
from moesaic.plan.hardware import measured_here
from moesaic.plan.kernels import measured_rates
from moesaic.plan.training_kernels import measured_training


@pytest.fixture(autouse=True)
def own_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.mark.slow
def test_kernels_are_timed_and_kept(monkeypatch):
    monkeypatch.setattr(machine, "PEAK_SIZE", 256)
    monkeypatch.setattr(machine, "_LEAST_PROBE_BYTES", 2**22)
    monkeypatch.setattr(machine, "_CACHES_OF_PROBE", 0)
    monkeypatch.setattr(here, "ROWS", (1, 8))
    monkeypatch.setattr(here, "_LONG", 128)
    monkeypatch.setattr(here, "_PIECE", 128)
    monkeypatch.setattr(here, "SETTINGS", {name: here.SETTINGS[name] for name in ("int8", "fp8")})
    found = here.measure(1)
    assert measured_rates() == found.rates and measured_here() == found.machine
    rates = found.rates
    assert set(rates.linear) == {"int8", "fp8-128"} == set(rates.experts) and rates.linear["int8"].rows == [1.0, 8.0]
    assert 5e7 < rates.base_bytes < 2e9  # a process that has torch in it
    assert 0 < rates.about["share"] <= 1 and rates.about["threads"] == 1
    assert all(seconds > 0 for seconds in rates.linear["fp8-128"].cold)


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
