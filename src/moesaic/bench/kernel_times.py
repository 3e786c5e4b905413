"""Products with packed weights, timed on made-up models: over rows, from memory and from a cache, of wide and narrow
matrices. Every sample is taken at the speeds that were read around it, and brought to those of the whole run."""

import math
import statistics
import time
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from moesaic.bench.made_up import NARROW, WIDE, Sizes, made_up_config, made_up_engine
from moesaic.bench.probes import Probes, parts_of_step
from moesaic.engine.engine import Engine
from moesaic.hub.codes import CodesFormat
from moesaic.kernels.rounding import Bits
from moesaic.plan.kinds import part_specs
from moesaic.plan.rates import Curve, Pace

LAYERS = 3
COLD_ROWS = {WIDE: (1, 4, 8, 16, 32, 64), NARROW: (1, 8, 16, 32, 64, 128)}
HOT_ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)
_SUSTAINED = 0.008
"""Seconds for which a step is repeated in a pass, at the least: what a processor does in its first milliseconds it may
not keep up."""
_NO_LONGER_COLD = 4.0
"""Times the most rows of a cold product: there it takes what a hot one does."""


class Setting(NamedTuple):
    """How a made-up model is packed, and what its parts are then made of."""

    bits: Bits | None
    codes: CodesFormat | None
    linear: str
    experts: str
    head: str


SETTINGS = {
    "bf16": Setting(None, None, "bf16", "bf16", "bf16"),
    "int8": Setting(8, None, "int8", "int8", "int8"),
    "int4": Setting(4, None, "int4", "int4", "int6"),
    "fp8": Setting(None, "fp8", "fp8-128", "fp8-128", "bf16"),
    "mxfp4": Setting(None, "mxfp4", "bf16", "mxfp4", "bf16"),
}


class Timed(NamedTuple):
    """Seconds by part of one step, and the speeds of memory and processors around it."""

    parts: dict[str, float]
    bandwidth: float
    compute: float


class Usual(NamedTuple):
    """Speeds that all samples are brought to: the middle ones of the run."""

    bandwidth: float
    compute: float

    def pace(self, sample: Timed) -> Pace:
        return Pace(sample.bandwidth / self.bandwidth, sample.compute / self.compute)


class Kernels:
    """One setting's kernels on models of one size: some layers in memory, one in a cache."""

    def __init__(self, probes: Probes, setting: Setting, sizes: Sizes, attention: str, threads: int) -> None:
        self.setting, self.sizes, self._probes = setting, sizes, probes

        def engine(layers: int, sizes: Sizes) -> Engine:
            config = made_up_config(attention, layers, sizes)
            return made_up_engine(config, bits=setting.bits, codes=setting.codes, threads=threads)

        self.far, self._near = engine(LAYERS, sizes), engine(1, sizes.near())
        self.cold: dict[int, list[Timed]] = {rows: [] for rows in COLD_ROWS[sizes]}
        self._hot: dict[int, list[Timed]] = {rows: [] for rows in HOT_ROWS}
        parts_of_step(self.far, max(self.cold), sizes)  # buffers grow

    def sample(self) -> None:
        """Each number of rows once."""
        takes = [(self.cold, self._cold, rows) for rows in self.cold]
        takes += [(self._hot, self._sustained, rows) for rows in self._hot]
        computes, bandwidths, found = [self._probes.compute(1)], [self._probes.bandwidth()], []
        for _, take, rows in takes:
            found.append(take(rows))
            computes.append(self._probes.compute(1))
            bandwidths.append(self._probes.bandwidth())
        for at, ((into, _, rows), parts) in enumerate(zip(takes, found, strict=True)):
            compute = statistics.median(computes[max(0, at - 1) : at + 3])
            into[rows].append(Timed(parts, statistics.mean(bandwidths[at : at + 2]), compute))

    def _cold(self, rows: int) -> dict[str, float]:
        return parts_of_step(self.far, rows, self.sizes)

    def _sustained(self, rows: int) -> dict[str, float]:
        """Middle seconds of steps one after the other."""
        near = self.sizes.near()
        if rows <= max(self.cold):
            parts_of_step(self._near, rows, near)  # into the caches
        samples, started = [], time.perf_counter()
        while not samples or time.perf_counter() - started < _SUSTAINED:
            samples.append(parts_of_step(self._near, rows, near))
        return {part: statistics.median(sample[part] for sample in samples) for part in samples[0]}

    def curve(self, part: str, usual: Usual) -> Curve:
        """Seconds a weight over rows of a matrix. Experts share a step's rows: each has rows * K / E of them."""
        share = self.sizes.top_k / self.sizes.experts if part == "experts" else 1.0
        hot = _rising(_hot(self._hot[rows], part, usual) / self._weights(self._near, part) for rows in HOT_ROWS)
        cold_rows = [rows * share for rows in self.cold if rows * share >= 1]
        alone = [float(np.interp(rows, HOT_ROWS, hot)) * self._weights(self.far, part) for rows in cold_rows]
        taken = _rising(
            _cold(self.cold[round(rows / share)], part, least, usual)
            for rows, least in zip(cold_rows, alone, strict=True)
        )
        ratios = [seconds / least for seconds, least in zip(taken, alone, strict=True)]
        at = [math.log(rows) for rows in (*cold_rows, _NO_LONGER_COLD * cold_rows[-1])]
        more = np.interp([math.log(rows) for rows in HOT_ROWS], at, [*ratios, 1.0])
        cold = [seconds * max(1.0, float(times)) for seconds, times in zip(hot, more, strict=True)]
        return Curve([float(rows) for rows in HOT_ROWS], cold, hot)

    def _weights(self, engine: Engine, part: str) -> float:
        config = engine.config
        if part == "head":
            return float(config.vocab_size * config.hidden_size)
        layer = config.layers[-1]
        block, role = (layer.feed_forward, "experts") if part == "experts" else (layer.attention, "attention")
        specs = [spec for spec in part_specs(block, config.hidden_size) if spec.role == role and len(spec.shape) > 1]
        return float(sum(spec.numel for spec in specs) * (len(config.layers) - 1))


def _rising(seconds: Iterable[float]) -> list[float]:
    """Of more rows each time, which never take less: what does was held up, as nothing ever speeds a product up."""
    return np.minimum.accumulate(list(seconds)[::-1])[::-1].tolist()


def _hot(samples: Iterable[Timed], part: str, usual: Usual) -> float:
    return statistics.median(sample.parts[part] * usual.pace(sample).compute for sample in samples)


def _cold(samples: Iterable[Timed], part: str, alone: float, usual: Usual) -> float:
    """At the usual speeds. alone: what it would take from a cache: that much of it does not wait for memory."""

    def brought(sample: Timed) -> float:
        seconds, pace = sample.parts[part], usual.pace(sample)
        waiting = 1 - min(1.0, alone / pace.compute / seconds) ** 2
        return seconds * (waiting * pace.memory + (1 - waiting) * pace.compute)

    return statistics.median(map(brought, samples))
