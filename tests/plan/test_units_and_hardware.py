"""Quantities, machines and prices: what is written, what is refused, what users add."""

import pytest

from moesaic.errors import ConfigError
from moesaic.plan import cost, hardware
from moesaic.plan.units import Unit, quantity


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("80 GiB", "bytes", 80 * 2**30),
        ("3350 GB/s", "bytes/s", 3.35e12),
        ("989 TFLOP/s", "FLOP/s", 989e12),
        ("2.5 $/h", "$/h", 2.5),
        ("0.002 $/ktok", "$/Mtok", 2.0),
        ("14.8T", "tokens", 14.8e12),
        ("3 us", "s", 3e-6),
        ("1,024", "tokens", 1024),
    ],
)
def test_quantities(text: str, unit: Unit, value: float) -> None:
    assert quantity(text, unit, "it") == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "unit", "words"),
    [
        ("2.5 $/Mtok", "$/h", r"unit of \$/Mtok, and this is in \$/h"),
        ("2.5", "$/h", "it has no unit"),
        ("80 apples", "bytes", "'apples' is no unit"),
        ("-1 W", "W", "give a number and its unit"),
        ("80 GB", "bytes/s", "unit of bytes, and this is in bytes/s"),
    ],
)
def test_wrong_units(text: str, unit: Unit, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        quantity(text, unit, "price")


def test_every_machine_says_where_its_figures_are_from() -> None:
    for device in hardware.devices().values():
        assert device.source and device.date, device.name
        assert device.rate("bf16") > 0 and device.bandwidth > 0


def test_machines_by_name() -> None:
    machine = hardware.find_machine("8xH100-SXM")
    assert (machine.name, machine.count, machine.price) == ("8xh100", 8, 24.0)
    assert machine.device.rate("fp4") == machine.device.rate("fp8")  # what it lacks it computes wider
    with pytest.raises(ConfigError, match="near it: h100, h800, h200"):
        hardware.find_machine("8xh10")
    with pytest.raises(ConfigError, match="has no devices"):
        hardware.find_machine("0xh100")


def test_a_users_own_machines_and_prices(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "moesaic"
    folder.mkdir()
    own = '[lab]\nmemory = "24 GB"\nbandwidth = "1 TB/s"\nflops = { bf16 = "100 TFLOP/s" }\nprice = "1 $/h"\n'
    (folder / "machines.toml").write_text(own)
    with pytest.raises(ConfigError, match="2 of lab, for which no link or network is stated"):
        hardware.find_machine("2xlab")
    (folder / "machines.toml").write_text(f'{own}link = "25 GB/s"\n')
    assert hardware.find_machine("2xlab").price == 2.0
    (folder / "machines.toml").write_text(own.replace("1 $/h", "1 $/Mtok"))
    with pytest.raises(ConfigError, match="price of machine lab"):
        hardware.find_machine("lab")
    (folder / "machines.toml").write_text(own.replace("memory", "memroy"))
    with pytest.raises(ConfigError, match="unknown field 'memroy'"):
        hardware.find_machine("lab")
    (folder / "prices.toml").write_text('[mine]\ninput = "1 $/Mtok"\noutput = "2 $/h"\n')
    with pytest.raises(ConfigError, match="output of mine"):
        cost.find_price("mine")


def test_this_machine_is_known_once_it_was_measured(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="not measured yet"):
        hardware.find_machine("here")
    hardware.here_file().parent.mkdir(parents=True)
    hardware.here_file().write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        hardware.find_machine("here")
