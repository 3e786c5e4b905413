"""How long our kernels take on this machine, each by itself, and how what it gives at a moment changes that. No torch.

What was measured are matrices of made-up models, never one that is planned: seconds for each weight at so many rows,
with weights in memory (cold) and in a cache (hot); attention, norms, routing and what lies outside of kernels.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moesaic.errors import ConfigError
from moesaic.plan.hardware import here_file

QUIET_SHARE, EVEN_SPREAD = 0.9, 2.0
"""Below this share of the processors, or above this ratio of fast to slow readings of memory, others were at work more
than what is read around each sample can make up for."""


class Speeds(NamedTuple):
    """What a machine gives at a moment: one that is shared gives more or less of each from second to second.

    bandwidth: bytes a second, of memory that no cache holds; near: of repeated reads of so many bytes as `sizes` of
    KernelRates says; compute: steps a second of small models that a cache holds (see bench/probes.py).
    """

    bandwidth: float
    compute: float
    near: tuple[float, ...]


class Pace(NamedTuple):
    """Speeds over those when kernels were measured."""

    memory: float
    compute: float


class Curve(NamedTuple):
    """Seconds a weight of one matrix takes at so many rows: read from memory, and from a cache."""

    rows: list[float]
    cold: list[float]
    hot: list[float]

    def at(self, rows: float | np.ndarray, pace: Pace, kept: float) -> np.ndarray:
        """At these rows. kept: the share of weights in the cache.

        Of a cold product the part that waits for memory goes as fast as memory, all else as fast as the processors.
        """
        cold = np.interp(rows, self.rows, self.cold)
        hot = np.minimum(np.interp(rows, self.rows, self.hot), cold)
        waiting = 1.0 - (hot / cold) ** 2
        beyond = np.maximum(1.0, np.asarray(rows, dtype=float) / self.rows[-1])  # products of many rows only compute
        hot_now = hot / pace.compute
        cold_now = np.maximum(hot_now, cold * (waiting / pace.memory + (1 - waiting) / pace.compute))
        return beyond * (kept * hot_now + (1 - kept) * cold_now)


class Scores(NamedTuple):
    """Attention's times: in each layer, for each number of a new row (turned and written to the cache), and by how many
    tokens it sees, for each multiplication of a query's number with a key's, or of a weight with a value's."""

    layer: float
    row: float
    seen: list[float]
    seconds: list[float]

    def at(self, seen: float) -> float:
        """Seconds a multiplication."""
        return float(np.interp(math.log(max(seen, 1.0)), np.log(self.seen), self.seconds))


class Routes(NamedTuple):
    """A router's times: in each layer, for each of its weights, and the same for each token."""

    layer: float
    weight: float
    token: float
    token_weight: float


class Outside(NamedTuple):
    """What lies outside of kernels: of a step, of each text in it, of each token of a prompt, of each logit."""

    step: float
    text: float
    token: float
    logit: float


@dataclass(frozen=True, kw_only=True)
class KernelRates:
    """What was measured, all at one pace: that of `bandwidth` and `compute` (see Speeds).

    linear, latent, experts, fine, head: curves by format; of projections, of all those of latent attention together,
    of a feed-forward block's or experts' matrices, of narrow ones, of the head. slender: for each weight of experts and
    of fine ones, how many outputs it has: what a product does for each output weighs more in narrow ones.
    sizes, bandwidths: of repeated reads of so many bytes. decode, prompt: of one new token a text, and of prompts, by
    how many query heads share a key (latent attention: all). norm: in each layer, and for each number.
    base_bytes: what a process takes before it holds a model. about: which machine, when, and how much of it this
    program had ("share", "spread": see bench/machine.py, WatchedProbe).
    """

    bandwidth: float
    compute: float
    sizes: list[float]
    bandwidths: list[float]
    linear: dict[str, Curve]
    latent: dict[str, Curve]
    experts: dict[str, Curve]
    fine: dict[str, Curve]
    head: dict[str, Curve]
    slender: tuple[float, float]
    decode: dict[str, Scores]
    prompt: dict[str, Scores]
    norm: tuple[float, float]
    route: Routes
    outside: Outside
    base_bytes: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def machine(self) -> str:
        """What was measured, in words."""
        about = self.about
        return f"{about['processor']}, {about['threads']} threads, {about['isa']}" if "isa" in about else ""

    @property
    def busy(self) -> str | None:
        """What other programs did meanwhile, in words; None: nothing that matters."""
        share, spread = self.about.get("share", 1.0), self.about.get("spread", 1.0)
        if share >= QUIET_SHARE and spread <= EVEN_SPREAD:
            return None
        return f"other programs had {1 - share:.0%} of the processors, and memory's bandwidth varied {spread:.1f}-fold"

    @property
    def speeds(self) -> Speeds:
        """Those when kernels were measured."""
        return Speeds(self.bandwidth, self.compute, tuple(self.bandwidths))

    def pace(self, now: Speeds) -> Pace:
        """Of a moment."""
        return Pace(now.bandwidth / self.bandwidth, now.compute / self.compute)

    def kept(self, num_bytes: float, now: Speeds | None = None) -> float:
        """The share of so many bytes that a cache still holds when they are read once more."""
        near = self.bandwidths if now is None else now.near
        in_memory, in_cache = near[-1], max(near[:2])
        if in_cache <= in_memory:
            return 0.0
        at = float(np.interp(math.log(num_bytes), np.log(self.sizes), near))
        return min(1.0, max(0.0, (1 / in_memory - 1 / at) / (1 / in_memory - 1 / in_cache)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        tables = {kind: {name: each._asdict() for name, each in getattr(self, kind).items()} for kind in _TABLES}
        return asdict(self) | tables | {"route": self.route._asdict(), "outside": self.outside._asdict()}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "KernelRates":
        """The inverse of `to_dict`."""
        tables = {kind: {name: make(**each) for name, each in tree[kind].items()} for kind, make in _TABLES.items()}
        pairs = {"slender": tuple(tree["slender"]), "norm": tuple(tree["norm"])}
        return cls(
            **{**tree, **tables, **pairs, "route": Routes(**tree["route"]), "outside": Outside(**tree["outside"])}
        )


_TABLES: dict[str, Any] = {
    "linear": Curve, "latent": Curve, "experts": Curve, "fine": Curve, "head": Curve, "decode": Scores, "prompt": Scores
}  # fmt: skip


def measured_rates() -> KernelRates | None:
    """What was measured of this machine before; None where nothing was. Raises ConfigError for a damaged file."""
    path = here_file()
    if not path.is_file():
        return None
    try:
        return KernelRates.from_dict(json.loads(path.read_text(encoding="utf-8"))["kernels"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is of another version, or damaged; take it away, or run: moesaic plan MODEL --machine here"
        ) from error
