"""The options of `moesaic plan` that are more than a word: counts, lists of NAME=VALUE, quantities with units."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from moesaic.errors import ConfigError
from moesaic.plan.cost import Workload
from moesaic.plan.layout import Layout
from moesaic.plan.units import Unit, quantity
from moesaic.registry import unknown_name


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `--set` takes; None: as the plan has it. Sizes in bytes, rates in bytes a second."""

    overlap: float | None = None
    utilisation: float = 0.5
    quality: float | None = None
    host_memory: float | None = None
    host_bandwidth: float | None = None
    ssd: float | None = None
    ssd_bandwidth: float | None = None
    recompute: Literal["none", "experts", "layers"] | None = None
    zero: Literal[0, 1, 2, 3] | None = None
    micro_batch: int | None = None
    batch_tokens: float | None = None
    served: float | None = None
    train_machine: str | None = None


_UNITS: dict[str, Unit] = {
    "quality": "tokens",
    "host_memory": "bytes",
    "host_bandwidth": "bytes/s",
    "ssd": "bytes",
    "ssd_bandwidth": "bytes/s",
    "batch_tokens": "tokens",
    "micro_batch": "tokens",
    "served": "tokens",
}
_WHOLE = ("zero", "micro_batch")
_WORDS = ("recompute", "train_machine")


def read_count(option: str, text: str, *, binary: bool = False) -> int:
    """A whole number above 0, with k or M behind it where that is shorter. binary: 8k are 8,192."""
    kilo = 1024 if binary else 1000
    factor = {"k": kilo, "K": kilo, "M": kilo**2, "m": kilo**2}.get(text[-1:], 1)
    digits = text if factor == 1 else text[:-1]
    try:
        value = float(digits.replace(",", "").replace("_", "")) * factor
    except ValueError:
        value = 0.0
    if not (1 <= value < math.inf) or value != int(value):
        raise ConfigError(f"{option} {text}; give a whole number above 0, such as 8192 or 8k")
    return int(value)


def read_pairs(option: str, text: str, known: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, comma-separated. Raises ConfigError for a name that is not known or given twice."""
    found: dict[str, str] = {}
    for pair in text.split(","):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if name not in known:
            raise unknown_name(option, name, list(known))
        if not equals or not value or name in found:
            raise ConfigError(f"{option} {text}; write {name}=VALUE once")
        found[name] = value
    return found


def read_layout(text: str) -> Layout:
    """tp=8,ep=8,... Raises ConfigError for degrees that do not go together.

    Where `dp` is left out it is as large as `ep` asks for.
    """
    names = [field.name for field in fields(Layout)]
    found = {name: read_count("--layout", value) for name, value in read_pairs("--layout", text, names).items()}
    if "dp" not in found and "ep" in found:
        found["dp"] = max(1, found["ep"] * found.get("etp", 1) // found.get("tp", 1))
    return Layout(**found)


def read_workload(text: str) -> Workload:
    """input=2000,output=500,requests=1M,... Raises ConfigError for what is no workload."""
    short = {"input": "input_tokens", "output": "output_tokens"}
    names = [*short, *(field.name for field in fields(Workload) if not field.name.endswith("_tokens"))]
    pairs = read_pairs("--workload", text, names)
    return Workload(
        **{short.get(name, name): quantity(value, "tokens", f"--workload {name}") for name, value in pairs.items()}
    )


def read_settings(pairs: Sequence[str]) -> Settings:
    """What `--set NAME=VALUE` says, each once. Raises ConfigError for unknown names and wrong units."""
    names = [field.name for field in fields(Settings)]
    found: dict[str, Any] = {}
    for pair in pairs:
        for name, value in read_pairs("--set", pair, names).items():
            found[name] = _setting(name, value)
    return Settings(**found)


def _setting(name: str, value: str) -> Any:
    if name in _WORDS:
        return value
    if name in _UNITS:
        number = quantity(value, _UNITS[name], f"--set {name}")
    else:
        try:
            number = float(value)
        except ValueError as error:
            raise ConfigError(f"--set {name}={value}; give a number") from error
    return int(number) if name in _WHOLE else number
