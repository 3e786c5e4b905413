"""Machines as data: bytes, bytes a second, operations a second, links, power and price, each with its source.

`machines.toml` beside this file holds what makers state; a file of the user's own adds to it or replaces entries.
"""

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from moesaic.checks import require
from moesaic.errors import ConfigError
from moesaic.plan.units import Unit, quantity

Number = Literal["fp32", "bf16", "fp8", "int8", "fp4"]
"""What products are made of."""

WIDER: dict[Number, tuple[Number, ...]] = {
    "fp4": ("fp4", "fp8", "int8", "bf16", "fp32"),
    "fp8": ("fp8", "bf16", "fp32"),
    "int8": ("int8", "bf16", "fp32"),
    "bf16": ("bf16", "fp32"),
    "fp32": ("fp32", "bf16"),
}
"""In what a machine computes products of these numbers: the first of them that it has (a TPU's fp32 are passes of bf16,
counted as one)."""

OWN_FILE = "machines.toml"


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What of a device's stated rates programs get, and what every operation takes besides.

    memory, compute, network: shares of bytes a second read, operations a second, bytes a second sent. kernel_s: of
    starting an operation; hop_s: of a message. Memory, kernel_s and hop_s are the empirical defaults of
    ai-dynamo/aiconfigurator; compute is what large matrix products reach of the stated rate [M].
    """

    memory: float = 0.8
    compute: float = 0.7
    network: float = 0.8
    kernel_s: float = 3e-6
    hop_s: float = 10e-6

    def __post_init__(self) -> None:
        for name in ("memory", "compute", "network"):
            share = getattr(self, name)
            require(0 < share <= 1, f"efficiency of {name} {share}; use a share above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One processor with memory of its own. Rates are those that its maker states, for dense products.

    link, network: bytes a second, one direction, of one device, to others of its node and to other nodes; 0: none.
    per_node: devices that links join. host_link: from the host's memory; 0: it is the host. price: dollars an hour;
    None: unknown. peak_source and date: where the figures come from, and when they were put down.
    """

    name: str
    kind: Literal["gpu", "cpu", "tpu", "mac"]
    memory_bytes: float
    bandwidth: float
    flops: Mapping[Number, float]
    link: float = 0.0
    network: float = 0.0
    per_node: int = 1
    host_link: float = 0.0
    watts: float | None = None
    price: float | None = None
    price_range: str = ""
    source: str = ""
    date: str = ""
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def joins(self) -> bool:
        """Whether several can work on one model: some link or network between them is stated."""
        return self.link > 0 or self.network > 0

    def rate(self, number: Number) -> float:
        """Operations a second on such numbers, as stated, in the narrowest format that the device computes them in."""
        return self.flops[self.computes_in(number)]

    def computes_in(self, number: Number) -> Number:
        """The format that products of such numbers are computed in. Raises ConfigError where there is none."""
        for wider in WIDER[number]:
            if wider in self.flops:
                return wider
        raise ConfigError(f"machine {self.name!r} states no rate for {number}; add flops.{number} to its entry")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`count` devices of one kind, in nodes of `device.per_node`, and what memory lies behind them.

    host_bytes, ssd_bytes: behind each node (0: none, or not known), host_bandwidth, ssd_bandwidth: bytes a second.
    """

    device: Device
    count: int = 1
    host_bytes: float = 0.0
    host_bandwidth: float = 0.0
    ssd_bytes: float = 0.0
    ssd_bandwidth: float = 0.0

    @property
    def name(self) -> str:
        return self.device.name if self.count == 1 else f"{self.count}x{self.device.name}"

    @property
    def num_nodes(self) -> int:
        return -(-self.count // self.device.per_node)

    @property
    def memory_bytes(self) -> float:
        """Of all devices."""
        return self.count * self.device.memory_bytes

    @property
    def price(self) -> float | None:
        """Dollars an hour, of all devices."""
        return None if self.device.price is None else self.count * self.device.price

    @property
    def watts(self) -> float | None:
        """Of all devices."""
        return None if self.device.watts is None else self.count * self.device.watts

    def with_price(self, dollars_per_hour: float | None) -> "Machine":
        """The same at another price of one device an hour; None leaves it."""
        if dollars_per_hour is None:
            return self
        return replace(self, device=replace(self.device, price=dollars_per_hour, price_range="given"))


def devices() -> dict[str, Device]:
    """Every known device by name, the user's own included; theirs go before ours."""
    return dict(_shipped()) | _from_file(own_file())


def own_file() -> Path:
    """Where users put machines of their own: machines.toml in moesaic's folder of settings."""
    settings = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(settings) / "moesaic" / OWN_FILE


def state_folder() -> Path:
    """Where moesaic keeps what it measured on this machine."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "moesaic"


def here_file() -> Path:
    """What was measured of this machine, as JSON (see bench/here.py)."""
    return state_folder() / "here.json"


def measured_here() -> Machine | None:
    """This machine as it was measured before; None where it was not. Raises ConfigError for a damaged file."""
    path = here_file()
    if not path.is_file():
        return None
    try:
        entry = dict(json.loads(path.read_text(encoding="utf-8"))["device"])
        efficiency = Efficiency(memory=1.0, compute=1.0, network=1.0, kernel_s=entry.pop("kernel_s"))
        return Machine(device=Device(name="here", kind="cpu", efficiency=efficiency, **entry))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is of another version, or damaged; take it away, or run: moesaic plan MODEL --machine here"
        ) from error


def find_device(name: str, known: Mapping[str, Device] | None = None) -> Device:
    """The device of this name or alias. Raises ConfigError that lists near names."""
    known = devices() if known is None else known
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    key = _aliases().get(key, key) if key not in known else key
    if key in known:
        return known[key]
    near = get_close_matches(key, [*known, *_aliases()], n=3, cutoff=0.4)
    hint = f"; near it: {', '.join(dict.fromkeys(_aliases().get(each, each) for each in near))}" if near else ""
    raise ConfigError(
        f"unknown machine {name!r}{hint}. Known: {', '.join(known)}, here; a number before it counts devices (8xh100), "
        f"and {own_file()} takes your own"
    )


_MOST = 1_000_000


def find_machine(text: str) -> Machine:
    """A machine as people write it: "h100", "8xh100". Raises ConfigError for an unknown device or an odd number."""
    matched = re.fullmatch(r"\s*(?:(\d+)\s*[xX*]\s*)?(.+?)\s*", text)
    if matched is None:
        raise ConfigError(f"machine {text!r}; write a device and how many, such as 8xh100")
    if matched[2].lower() == "here":
        return _here()
    count = 1 if matched[1] is None else int(matched[1])
    require(count > 0, f"machine {text!r} has no devices; write 1 or more, such as 8xh100")
    require(count <= _MOST, f"machine {text!r} has {count:,} devices; write {_MOST:,} or fewer")
    device = find_device(matched[2])
    require(
        count == 1 or device.joins,
        f"{count} of {device.name}, for which no link or network is stated; plan one, or give your own entry of it in "
        f"{own_file()} a link or network, such as 12.5 GB/s",
    )
    return Machine(device=device, count=count)


def _here() -> Machine:
    found = measured_here()
    if found is None:
        raise ConfigError("this machine was not measured yet; run `moesaic plan MODEL --machine here` once")
    return found


@cache
def _shipped() -> dict[str, Device]:
    text = (files("moesaic.plan") / OWN_FILE).read_text(encoding="utf-8")
    return {name: read_device(name, entry, OWN_FILE) for name, entry in tomllib.loads(text).items()}


def _from_file(path: Path) -> dict[str, Device]:
    """The devices of a user's own file; none where there is no file. Raises ConfigError for one that is wrong."""
    return {name: read_device(name, entry, str(path)) for name, entry in _tables(path).items()}


def _tables(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is no TOML file ({error}); mend it or take it away") from error


@cache
def _aliases() -> dict[str, str]:
    text = (files("moesaic.plan") / OWN_FILE).read_text(encoding="utf-8")
    return {alias: name for name, entry in tomllib.loads(text).items() for alias in entry.get("aliases", ())}


_QUANTITIES: dict[str, tuple[str, Unit]] = {
    "memory": ("memory_bytes", "bytes"),
    "bandwidth": ("bandwidth", "bytes/s"),
    "link": ("link", "bytes/s"),
    "network": ("network", "bytes/s"),
    "host_link": ("host_link", "bytes/s"),
    "power": ("watts", "W"),
    "price": ("price", "$/h"),
}
"""Fields of an entry that are quantities: what they are called here, and their unit."""

_WORDS = ("price_range", "source", "date")
_KINDS = ("gpu", "cpu", "tpu", "mac")
_SHARES = ("memory", "compute", "network")


def read_device(name: str, entry: Any, where: str) -> Device:
    """A device from its TOML table. where: the file, for messages. Raises ConfigError for what makes no sense."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: {name} = {entry!r}; a machine is a table, [{name}], with memory, bandwidth, flops")
    known = {*_QUANTITIES, *_WORDS, "kind", "flops", "per_node", "aliases", "efficiency"}
    if unknown := sorted(entry.keys() - known):
        raise ConfigError(f"{where}: unknown field {unknown[0]!r} of machine {name}; known: {', '.join(sorted(known))}")
    if missing := [each for each in ("memory", "bandwidth", "flops") if each not in entry]:
        raise ConfigError(f"{where}: machine {name} has no {missing[0]}; it needs memory, bandwidth and flops")
    kind, per_node = entry.get("kind", "gpu"), entry.get("per_node", 1)
    require(kind in _KINDS, f"{where}: kind={kind!r} of machine {name}; known: {', '.join(_KINDS)}")
    require(
        isinstance(per_node, int) and per_node > 0, f"{where}: per_node={per_node!r} of machine {name}; give 1 or more"
    )
    given: dict[str, Any] = {
        ours: quantity(entry[theirs], unit, f"{where}: {theirs} of machine {name}")
        for theirs, (ours, unit) in _QUANTITIES.items()
        if theirs in entry
    }
    for ours in ("memory_bytes", "bandwidth"):
        require(given[ours] > 0, f"{where}: machine {name} has {ours} 0; give more")
    words: dict[str, Any] = {each: str(entry[each]) for each in _WORDS if each in entry}
    rates = _rates(name, entry["flops"], where)
    efficiency = _efficiency(name, entry.get("efficiency", {}), where)
    return Device(name=name, kind=kind, flops=rates, per_node=per_node, efficiency=efficiency, **given, **words)


def _rates(name: str, entry: Any, where: str) -> dict[Number, float]:
    if not isinstance(entry, dict) or not entry or entry.keys() - WIDER.keys():
        raise ConfigError(
            f'{where}: flops = {entry!r} of machine {name}; write {{ bf16 = "989 TFLOP/s" }}, of {", ".join(WIDER)}'
        )
    return {number: quantity(rate, "FLOP/s", f"{where}: flops.{number} of {name}") for number, rate in entry.items()}


def _efficiency(name: str, entry: Any, where: str) -> Efficiency:
    known = (*_SHARES, "kernel", "hop")
    if not isinstance(entry, dict) or entry.keys() - set(known):
        raise ConfigError(f"{where}: efficiency = {entry!r} of machine {name}; it has {', '.join(known)}")
    shares = {each: float(entry[each]) for each in _SHARES if each in entry}
    times = {f"{each}_s": quantity(entry[each], "s", each) for each in ("kernel", "hop") if each in entry}
    return Efficiency(**shares, **times)
