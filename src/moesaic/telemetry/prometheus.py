"""Routing as Prometheus text: for a scrape, or for the text-file collector of its node exporter.

The format (https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4) is a few lines and frozen, so
no package is needed to write it; the tests read it back with the official client.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

from moesaic.errors import RunFolderError
from moesaic.telemetry.health import LayerHealth, RouterHealth
from moesaic.telemetry.load import StepLoad, sum_loads

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Family(NamedTuple):
    name: str
    kind: Literal["counter", "gauge"]
    help: str


_ROWS = _Family("moesaic_expert_rows_total", "counter", "Rows that the router gave to an expert.")
_TOKENS = _Family("moesaic_routed_tokens_total", "counter", "Tokens that were routed in a layer.")
_DROPPED = _Family("moesaic_dropped_rows_total", "counter", "Rows that no expert computed for want of a slot.")
_GAUGES = {
    "max_violation": "Heaviest load over the mean, less 1 (MaxVio).",
    "load_entropy": "Entropy of the load over ln E; 1 is even.",
    "effective_experts": "As how many equally loaded experts the load is worth.",
    "coefficient_of_variation": "Standard deviation of the load over its mean.",
    "router_entropy": "Mean entropy of a token's scores over ln E.",
    "average_entropy": "Entropy of the mean scores over ln E.",
}
_LOGITS = {
    "rms": "Root mean square of router logits.",
    "peak": "Largest magnitude of a router logit.",
    "margin": "Mean gap between the last chosen and the first other logit.",
    "flips_bf16": "Share of choices that rounding logits to bf16 changes.",
    "flips_noise": "Share of choices that noise of 1 % changes.",
}
_DEAD = _Family(
    "moesaic_dead_experts", "gauge", "Experts below a tenth of the fair share, where there is enough to tell."
)


class Exposed(NamedTuple):
    """What is exposed of one model or run. total: everything since the start, for counters; window: the newest part of
    it, for gauges; labels: added to every sample, such as {"run": "first"}."""

    total: StepLoad
    window: StepLoad | None = None
    labels: Mapping[str, str] | None = None


def exposition(total: StepLoad, window: StepLoad | None = None, labels: Mapping[str, str] | None = None) -> str:
    """Prometheus text of one model, see `Exposed`. What is unknown (NaN) is left out."""
    return exposition_of([Exposed(total, window, labels)])


def exposition_of(exposed: Sequence[Exposed]) -> str:
    """Prometheus text of several models, whose labels tell them apart. What is unknown (NaN) is left out."""
    found: dict[_Family, _Samples] = {}
    for total, window, labels in exposed:
        fixed = dict(labels or {})
        for family, samples in _families(total, RouterHealth.of(window or total).layers):
            known = [({**fixed, **own}, value) for own, value in samples if not math.isnan(value)]
            found.setdefault(family, []).extend(known)
    lines: list[str] = []
    for family, samples in found.items():
        if samples:
            lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
            lines += [f"{family.name}{_labels(own)} {_number(value)}" for own, value in samples]
    return "".join(f"{line}\n" for line in lines)


_Samples = list[tuple[dict[str, str], float]]


def _families(total: StepLoad, health: tuple[LayerHealth, ...]) -> Iterator[tuple[_Family, _Samples]]:
    layers = total.layers
    yield (
        _ROWS,
        [
            ({"layer": str(load.layer), "expert": str(expert)}, float(rows))
            for load in layers
            for expert, rows in enumerate(load.counts_E)
        ],
    )
    yield _TOKENS, [({"layer": str(load.layer)}, float(load.num_tokens)) for load in layers]
    yield _DROPPED, [({"layer": str(load.layer)}, float(load.dropped_rows)) for load in layers]
    for name, text in _GAUGES.items():
        family = _Family(f"moesaic_router_{name}", "gauge", text)
        yield family, [({"layer": str(layer.layer)}, float(getattr(layer, name))) for layer in health]
    for name, text in _LOGITS.items():
        family = _Family(f"moesaic_router_logit_{name}", "gauge", text)
        yield family, [({"layer": str(one.layer)}, getattr(one.logits, name)) for one in health if one.logits]
    yield _DEAD, [({"layer": str(one.layer)}, float(len(one.dead))) for one in health if one.dead is not None]


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


class PrometheusFile:
    """A file of the newest text: counters since this object was made, gauges of the last window.

    Written with the first window, then at most once in `EVERY_S` seconds, which is more often than anyone scrapes, and
    when it is closed. Readers see the old text or the new one, never half. Raises RunFolderError where it cannot be
    written.
    """

    EVERY_S = 1.0

    def __init__(self, path: Path, labels: Mapping[str, str] | None = None) -> None:
        self.path, self.labels = path, dict(labels or {})
        self._total: StepLoad | None = None
        self._waiting: list[StepLoad] = []
        self._written_s = -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def add(self, load: StepLoad) -> None:
        """Count one more window."""
        if load.layers:
            self._waiting.append(load)
            if time.monotonic() - self._written_s >= self.EVERY_S:
                self._write()

    def close(self) -> None:
        """Write what was not written yet."""
        if self._waiting:
            self._write()

    def _write(self) -> None:
        window = self._waiting[-1]
        self._total = sum_loads([*([self._total] if self._total else []), *self._waiting])
        self._waiting.clear()
        self._written_s = time.monotonic()
        beside = self.path.with_name(f".{self.path.name}.partial")
        try:
            beside.write_text(exposition(self._total, window, self.labels), encoding="utf-8")
            os.replace(beside, self.path)
        except OSError as error:
            raise RunFolderError(f"cannot write {self.path}: {error.strerror}; free space") from error
