"""Dollars and joules: of tokens, of months, of training, of a model's whole life, and beside what others ask."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from moesaic.checks import require
from moesaic.config import ModelConfig
from moesaic.errors import ConfigError
from moesaic.plan.flops import training_flops
from moesaic.plan.hardware import Machine, Number, own_file
from moesaic.plan.units import quantity
from moesaic.registry import unknown_name

MILLION, HOUR, MONTH_HOURS = 1e6, 3600.0, 730.0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked of a model: tokens read and written by a request, and requests a month.

    reasoning: written tokens for each one that the user sees; retries: requests for each that counts; cached: the share
    of the input that a prefix cache holds; batch_discount: what a price is lower by for answers without haste.
    """

    input_tokens: float = 2000.0
    output_tokens: float = 500.0
    requests: float = 1e5
    reasoning: float = 1.0
    retries: float = 1.0
    cached: float = 0.0
    batch_discount: float = 0.0

    def __post_init__(self) -> None:
        for name in ("input_tokens", "output_tokens", "requests"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}; use 0 or more")
        for name in ("reasoning", "retries"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}; use 1 or more")
        for name in ("cached", "batch_discount"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)}; use a share from 0 to 1")

    @property
    def monthly_input(self) -> float:
        return self.input_tokens * self.requests * self.retries

    @property
    def monthly_output(self) -> float:
        return self.output_tokens * self.requests * self.reasoning * self.retries


@dataclass(frozen=True, kw_only=True)
class Price:
    """Dollars for a million tokens. cached: of input that a cache holds; None: as other input."""

    name: str
    input: float
    output: float
    cached: float | None = None
    date: str = ""
    source: str = ""

    def month(self, work: Workload) -> float:
        """Dollars a month."""
        cached = self.input if self.cached is None else self.cached
        read = work.monthly_input * (cached * work.cached + self.input * (1 - work.cached))
        return (read + work.monthly_output * self.output) * (1 - work.batch_discount) / MILLION


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Tokens a second that a machine reads and writes when it does nothing else, and what it costs and draws."""

    prefill: float
    decode: float
    dollars_per_hour: float | None
    watts: float | None


@dataclass(frozen=True, kw_only=True)
class ServingCost:
    """Dollars and energy of a million tokens at a utilisation; None where the machine states no price or power.

    hours: of the machine a month for the workload; machines: how many of it that takes at this utilisation.
    """

    input: float | None
    output: float | None
    input_kwh: float | None
    output_kwh: float | None
    joules_per_token: float | None
    hours: float
    machines: float
    month: float | None


def dollars_per_million(dollars_per_hour: float, tokens_per_second: float, utilisation: float = 1.0) -> float:
    """Of a machine that is busy for this share of the hours that are paid for."""
    return dollars_per_hour / HOUR / (tokens_per_second * utilisation) * MILLION


def serving_cost(rates: Rates, work: Workload, utilisation: float) -> ServingCost:
    """What a machine's tokens cost. Cached input is not read again; retries and reasoning are."""
    require(0 < utilisation <= 1, f"utilisation={utilisation}; use a share above 0 and at most 1")
    busy = work.monthly_input * (1 - work.cached) / rates.prefill + work.monthly_output / rates.decode
    hours = busy / HOUR / utilisation
    dollars, watts = rates.dollars_per_hour, rates.watts

    def price(rate: float) -> float | None:
        return None if dollars is None else dollars_per_million(dollars, rate, utilisation)

    def energy(rate: float) -> float | None:
        return None if watts is None else watts / rate / utilisation * MILLION / 3.6e6

    return ServingCost(
        input=price(rates.prefill),
        output=price(rates.decode),
        input_kwh=energy(rates.prefill),
        output_kwh=energy(rates.decode),
        joules_per_token=None if watts is None else watts / rates.decode / utilisation,
        hours=hours,
        machines=hours / MONTH_HOURS,
        month=None if dollars is None else dollars * hours,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """What training on so many tokens takes."""

    tokens: float
    flops: float
    device_hours: float
    days: float
    dollars: float | None
    kwh: float | None


def training_cost(
    config: ModelConfig,
    machine: Machine,
    tokens: float,
    *,
    sequence_length: int = 4096,
    utilisation: float = 0.35,
    number: Number = "bf16",
) -> TrainingCost:
    """Three forward passes' worth of FLOPs a token, at this share of the rate that devices state (MFU)."""
    require(tokens > 0, f"{tokens} training tokens; use 1 or more")
    require(0 < utilisation <= 1, f"utilisation={utilisation}; use a share above 0 and at most 1")
    flops = training_flops(config, sequence_length) * tokens
    hours = flops / (machine.device.rate(number) * utilisation) / HOUR
    return cost_of_hours(hours, machine, tokens=tokens, flops=flops)


def cost_of_hours(device_hours: float, machine: Machine, *, tokens: float = 0.0, flops: float = 0.0) -> TrainingCost:
    """The same where the hours are known."""
    device = machine.device
    return TrainingCost(
        tokens=tokens,
        flops=flops,
        device_hours=device_hours,
        days=device_hours / machine.count / 24,
        dollars=None if device.price is None else device_hours * device.price,
        kwh=None if device.watts is None else device_hours * device.watts / 1e3,
    )


def lifetime_dollars(training: float, per_million: float, tokens: float) -> float:
    """Training and serving so many tokens."""
    return training + per_million * tokens / MILLION


def break_even_tokens(training: float, own_per_million: float, other_per_million: float) -> float | None:
    """Served tokens after which training has paid for itself; None: never, since serving it costs no less."""
    saved = other_per_million - own_per_million
    return None if saved <= 0 else training / saved * MILLION


def prices() -> dict[str, Price]:
    """The table of API prices, with the user's own entries before ours."""
    return dict(_shipped()) | _own()


def find_price(name: str) -> Price:
    """The price of this name. Raises ConfigError that lists near names."""
    known = prices()
    if name not in known:
        raise unknown_name("price", name, sorted(known))
    return known[name]


def with_discount(price: Price, share: float) -> Price:
    """The same, lower by a share."""
    cached = None if price.cached is None else price.cached * (1 - share)
    return replace(price, input=price.input * (1 - share), output=price.output * (1 - share), cached=cached)


@cache
def _shipped() -> dict[str, Price]:
    return _read((files("moesaic.plan") / "prices.toml").read_text(encoding="utf-8"), "prices.toml")


def _own() -> dict[str, Price]:
    path = own_prices()
    return _read(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}


def own_prices() -> Path:
    """Where users put prices of their own."""
    return own_file().with_name("prices.toml")


def _read(text: str, where: str) -> dict[str, Price]:
    try:
        tables: Mapping[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is no TOML file ({error}); mend it or take it away") from error
    return {name: _price(name, entry, where) for name, entry in tables.items()}


def _price(name: str, entry: Any, where: str) -> Price:
    known = {"input", "output", "cached", "date", "source"}
    if not isinstance(entry, dict) or not {"input", "output"} <= entry.keys() <= known:
        raise ConfigError(f"{where}: [{name}] needs input and output, and may have cached, date and source")
    amounts: dict[str, Any] = {
        kind: quantity(entry[kind], "$/Mtok", f"{where}: {kind} of {name}")
        for kind in ("input", "output", "cached")
        if kind in entry
    }
    words: dict[str, Any] = {kind: str(entry[kind]) for kind in ("date", "source") if kind in entry}
    return Price(name=name, **amounts, **words)
