"""Quantities that people write, "80 GiB", "3350 GB/s", "2.5 $/h", as numbers of one unit; a wrong unit is an error."""

import math
import re
from typing import Literal

from moesaic.errors import ConfigError

Unit = Literal["bytes", "bytes/s", "FLOP/s", "W", "$/h", "$/Mtok", "$/kWh", "s", "tokens"]

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {f"{letter}i": 2.0 ** (10 * power) for power, letter in enumerate("KMGTP", 1)}
_BYTES = {f"{prefix}B": factor for prefix, factor in (_DECIMAL | _BINARY).items()}
_HOUR = 3600.0

UNITS: dict[Unit, dict[str, float]] = {
    "bytes": _BYTES,
    "bytes/s": {f"{name}/s": factor for name, factor in _BYTES.items()},
    "FLOP/s": {f"{prefix}{what}": factor for prefix, factor in _DECIMAL.items() for what in ("FLOP/s", "OP/s")},
    "W": {"W": 1.0, "kW": 1e3, "MW": 1e6},
    "$/h": {"$/h": 1.0, "$/GPU-h": 1.0, "$/s": _HOUR, "$/day": 1 / 24, "$/month": 1 / 730},
    "$/Mtok": {"$/Mtok": 1.0, "$/M": 1.0, "$/ktok": 1e3, "$/tok": 1e6},
    "$/kWh": {"$/kWh": 1.0, "$/MWh": 1e-3},
    "s": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": _HOUR, "day": 24 * _HOUR},
    "tokens": {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "tokens": 1.0},
}
"""What may stand behind a number, and how many of the unit one of it is. Months have 730 hours."""

_EXAMPLES: dict[Unit, str] = {
    "bytes": '"80 GiB" or "512 GB"',
    "bytes/s": '"3350 GB/s"',
    "FLOP/s": '"989 TFLOP/s"',
    "W": '"700 W"',
    "$/h": '"2.5 $/h"',
    "$/Mtok": '"0.27 $/Mtok"',
    "$/kWh": '"0.12 $/kWh"',
    "s": '"3 us"',
    "tokens": '"8k" or "14.8T"',
}
_QUANTITY = re.compile(r"\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*(\S*)\s*")


def quantity(text: object, unit: Unit, what: str) -> float:
    """The number that a text stands for, in `unit`. what: names it in messages.

    Raises ConfigError for a text that is no number with a unit of this kind ("$/h" where tokens are paid for).
    """
    matched = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if matched is None:
        raise ConfigError(f"{what} = {text!r}; give a number and its unit, such as {_EXAMPLES[unit]}")
    number, suffix = matched.groups()
    factor = UNITS[unit].get(suffix)
    if factor is None:
        raise ConfigError(_wrong_unit(what, str(text), suffix, unit))
    value = float(number.replace(",", "").replace("_", "")) * factor
    if not math.isfinite(value):
        raise ConfigError(f"{what} = {text!r}; give a finite number, such as {_EXAMPLES[unit]}")
    return value


def _wrong_unit(what: str, text: str, suffix: str, unit: Unit) -> str:
    other = next((name for name, known in UNITS.items() if suffix and suffix in known), None)
    seen = f"{suffix!r} is a unit of {other}" if other else f"{suffix!r} is no unit" if suffix else "it has no unit"
    return f"{what} = {text!r}: {seen}, and this is in {unit}; write it like {_EXAMPLES[unit]}"
