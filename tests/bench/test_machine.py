"""moesaic.bench.machine: small memory and small products, since only their sense is tested."""

import pytest
import torch

from moesaic import _native
from moesaic.bench import machine


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(machine, "PEAK_SIZE", 64)
    monkeypatch.setattr(machine, "_LEAST_PROBE_BYTES", 2**20)
    monkeypatch.setattr(machine, "_CACHES_OF_PROBE", 0)


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_read(threads):
    assert 1e6 < machine.ReadProbe(threads).bandwidth() < 1e13


@pytest.mark.parametrize("count", [0, 64, 8 << 20, (8 << 20) + 64])
def test_a_probe_takes_memory_of_any_whole_lines(count):
    assert _native.ReadProbe(2).seconds(torch.ones(count, dtype=torch.uint8)) >= 0


def test_memory_of_broken_lines_is_refused():
    with pytest.raises(ValueError, match="multiple of 64 bytes"):
        _native.ReadProbe(1).seconds(torch.ones(65, dtype=torch.uint8))


def test_what_is_missing_is_what_is_better_than_the_set_in_use():
    before = _native.isa()
    try:
        _native.use_isa("portable")
        lowest = machine.measure_machine(1)
        _native.use_isa(_native.available_isas()[-1])
        best = machine.measure_machine(1)
    finally:
        _native.use_isa(before)
    assert lowest.isa == "portable" and best.isa == _native.available_isas()[-1]
    assert set(lowest.peaks) == {"fp32", "bf16", "int8"} and lowest.peaks["fp32"]
    if best.isa in machine._EXTENSIONS:
        assert len(lowest.missing) == len(machine._EXTENSIONS) and len(best.missing) < len(lowest.missing)
        assert "AVX2, which is switched off" in lowest.missing
        assert not any("switched off" in each for each in best.missing)


def test_torch_keeps_its_threads():
    before = torch.get_num_threads()
    machine.measure_machine(before + 1)
    assert torch.get_num_threads() == before


def test_the_probe_leaves_memory_to_others(monkeypatch):
    monkeypatch.setattr(machine, "_LEAST_PROBE_BYTES", 2**30)
    monkeypatch.setattr(machine, "available_bytes", lambda: 2**20 + 7)
    assert machine._probe_bytes() == 2**18


def test_narrow_products_are_no_slower_than_wide_ones():
    """Where a number has no instructions of its own, torch's loops say nothing of the machine."""
    assert machine._with_wider({"fp32": 5.0, "bf16": 1.0, "int8": 9.0}) == {"fp32": 5.0, "bf16": 5.0, "int8": 9.0}
    assert machine._with_wider({"fp32": 5.0, "bf16": None, "int8": 1.0}) == {"fp32": 5.0, "bf16": None, "int8": 5.0}


def test_the_size_of_products_follows_their_speed(monkeypatch):
    sizes = []

    def seconds(number, size, rounds):
        sizes.append(size)
        return [1e-12 * size**3 if number == "fp32" else 1e-9 * size**3] * rounds

    monkeypatch.setattr(machine, "PEAK_SIZE", 2048)
    monkeypatch.setattr(machine, "_seconds_of_products", seconds)
    assert machine._peak("fp32") == pytest.approx(2e12) and machine._peak("bf16") == pytest.approx(2e9)
    assert sizes == [256, 2048, 256, 512]


def test_a_watched_probe_notes_who_else_runs():
    probe = machine.WatchedProbe(1)
    assert probe.share == 1.0 and probe.spread == 1.0
    for _ in range(5):
        assert probe.bandwidth(2**16) > 0
    probe.bandwidth()
    assert 0 < probe.share <= 1 and probe.spread >= 1
