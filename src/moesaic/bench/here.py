"""This machine as a planner needs it: what it reads and computes, and how long our kernels take, each by itself.

Everything is timed on a made-up model (see made_up.py), never on one that is planned.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from moesaic.bench.machine import Machine as Measured
from moesaic.bench.machine import WatchedProbe, last_cache_bytes, measure_machine
from moesaic.bench.made_up import (
    ATTENTIONS,
    EXPERTS,
    HIDDEN,
    INNER,
    TOP_K,
    VOCABULARY,
    in_turn,
    made_up_config,
    made_up_engine,
)
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.engine.memory import available_bytes
from moesaic.engine.sampling import Sampling, sample
from moesaic.hub.codes import CodesFormat
from moesaic.kernels.rounding import Bits
from moesaic.plan.hardware import Device, Efficiency, Machine, Number, here_file
from moesaic.plan.kernels import Curve, KernelRates

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
WAITING_ROWS = 128
"""Up to so many rows of a step products may wait for memory; beyond them they compute."""
ROUNDS = 3
"""Passes over all numbers of rows: samples of one of them lie seconds apart, so that no mood of the machine is all of
them. Medians are taken all over: what is foretold is held against medians, too."""
_SUSTAINED = 0.05
"""Seconds for which a step is repeated in a pass, at the least: what a processor does in its first milliseconds it may
not keep up."""
_SHORT, _LONG, _TEXTS, _PIECE = 64, 1024, 4, 512


class Setting(NamedTuple):
    """How the made-up model is packed, and what its parts are then made of."""

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


class Here(NamedTuple):
    """This machine, and its kernels' times."""

    machine: Machine
    rates: KernelRates


def measure(threads: int | None = None, *, keep: bool = True) -> Here:
    """Time memory, products and kernels; takes about half a minute. keep: for later plans, in the state folder.

    Other programs make it wrong: `rates.busy` says so where there were any.
    """
    threads = threads or _threads()
    measured, probe = measure_machine(threads), WatchedProbe(threads)
    sizes, bandwidths = _cache_curve(probe)
    curves: dict[str, dict[str, Curve]] = {"linear": {}, "experts": {}, "head": {}}
    bench = _Bench(probe, threads)
    for setting in SETTINGS.values():
        for kind, packing, curve in bench.products(setting):
            curves[kind].setdefault(packing, curve)
    rates = KernelRates(
        bandwidth=bench.usual,
        sizes=sizes,
        bandwidths=bandwidths,
        linear=curves["linear"],
        experts=curves["experts"],
        head=curves["head"],
        **bench.small_parts(),
        base_bytes=_base_bytes(),
        about={
            "processor": measured.processor,
            "threads": threads,
            "isa": measured.isa,
            "date": _today(),
            "share": probe.share,
            "spread": probe.spread,
        },
    )
    found = Here(_machine(measured, rates), rates)
    if keep:
        _keep(found)
    return found


class Cold(NamedTuple):
    """Seconds by part of one step, and bytes a second that memory gave around it."""

    parts: dict[str, float]
    bandwidth: float


class _Bench:
    """Steps of made-up engines, each timed with memory that no cache holds, and again at once."""

    def __init__(self, probe: WatchedProbe, threads: int) -> None:
        self.probe, self.threads = probe, threads
        self.flood = min(
            probe.probe.num_bytes, max(2**28, 4 * last_cache_bytes()) // 64 * 64
        )  # leaves nothing in caches
        self.usual = statistics.median(probe.bandwidth() for _ in range(5))

    def products(self, setting: Setting) -> Iterator[tuple[str, str, Curve]]:
        """Curves of projections, experts and head, by what they are made of."""
        cold_engine = made_up_engine(made_up_config(), bits=setting.bits, codes=setting.codes, threads=self.threads)
        cold = self._cold(cold_engine, [rows for rows in ROWS if rows <= WAITING_ROWS])
        del cold_engine
        small = made_up_engine(made_up_config(layers=1), bits=setting.bits, codes=setting.codes, threads=self.threads)
        hot = _hot(small, ROWS)
        for kind, part, packing in (
            ("linear", "projections", setting.linear),
            ("experts", "experts", setting.experts),
            ("head", "head", setting.head),
        ):
            yield kind, packing, _curve(part, cold, hot, self.usual)

    def _cold(self, engine: Engine, numbers: Sequence[int]) -> dict[int, Cold]:
        """Steps that find nothing in the caches, by rows: of a few the middle one by the bandwidth it took."""
        samples: dict[int, list[Cold]] = {rows: [] for rows in numbers}
        for rows in numbers:
            _parts_of_step(engine, rows)  # buffers grow
        self.probe.bandwidth(self.flood)
        for _ in range(ROUNDS):
            for rows in numbers:
                samples[rows].append(Cold(_parts_of_step(engine, rows), self.probe.bandwidth(self.flood)))
        return {rows: sorted(found, key=_bytes_of_time)[ROUNDS // 2] for rows, found in samples.items()}

    def small_parts(self) -> dict[str, Any]:
        """Seconds of what is no product with weights, for each number that it touches."""
        score: dict[str, float] = {}
        prompt_score: dict[str, float] = {}
        rows: list[float] = []
        prompt_rows: list[float] = []
        for name in ATTENTIONS:
            engine = made_up_engine(made_up_config(name, 2, dense=True), threads=self.threads)
            score[name], row = _decode_scores(engine)
            prompt_score[name], prompt_row = _prompt_scores(engine)
            rows.append(row)
            prompt_rows.append(prompt_row)
        engine = made_up_engine(made_up_config(layers=2), threads=self.threads)
        hot = _hot(engine, (1, 256))
        many, one = hot[256], hot[1]
        norm = many["norm"] / (256 * HIDDEN * 5)
        route = many["router"] / (256 * 2 * EXPERTS * HIDDEN)
        rest = one["norm"] - 5 * norm * HIDDEN + one["router"] - 2 * route * EXPERTS * HIDDEN
        fixed, of_text = _outside(engine)
        return {
            "score": score,
            "prompt_score": prompt_score,
            "norm": norm,
            "row": statistics.median(rows),
            "prompt_row": statistics.median(prompt_rows),
            "route": route,
            "layer": max(0.0, rest) / 2,
            "outside": (fixed, of_text, _seconds_of_a_logit()),
        }


def _parts_of_step(engine: Engine, rows: int) -> dict[str, float]:
    """A prompt of so many tokens, logits of all of them, and the same rows for each expert."""
    text, layers = Text(), engine.config.moe_layers
    engine.program.native.reset_times()
    engine.step([Piece(text, list(range(rows)), "all")], dict.fromkeys(layers, in_turn(rows)))
    engine.free(text)
    return _times(engine)


def _times(engine: Engine) -> dict[str, float]:
    parts: dict[str, float] = {}
    for part, _layer, seconds in engine.program.native.times():
        parts[part] = parts.get(part, 0.0) + seconds
    return parts


def _bytes_of_time(sample: Cold) -> float:
    """What memory would have given in the time of a step."""
    return sum(sample.parts.values()) * sample.bandwidth


def _hot(engine: Engine, numbers: Sequence[int]) -> dict[int, dict[str, float]]:
    """What each part takes in steps one after the other, which find in the caches what fits there, by rows."""
    samples: dict[int, list[dict[str, float]]] = {rows: [] for rows in numbers}
    for _ in range(ROUNDS):
        for rows in numbers:
            if rows <= WAITING_ROWS:
                _parts_of_step(engine, rows)  # into the caches
            started = time.perf_counter()
            while True:
                samples[rows].append(_parts_of_step(engine, rows))
                if time.perf_counter() - started >= _SUSTAINED:
                    break
    return {
        rows: {part: statistics.median(s[part] for s in found) for part in found[0]} for rows, found in samples.items()
    }


def _curve(part: str, cold: dict[int, Cold], hot: dict[int, dict[str, float]], usual: float) -> Curve:
    """Seconds a weight over rows of a matrix, at the usual bandwidth. Experts share a step's rows: each has
    rows * K / E of them."""
    matrix = {"projections": HIDDEN * 512 * 2 + HIDDEN * 128 * 2, "head": VOCABULARY * HIDDEN}
    rows, cold_s, hot_s = [], [], []
    for tokens in ROWS:
        if part == "experts":
            if tokens * TOP_K < EXPERTS:
                continue
            weights, own = EXPERTS * 3 * HIDDEN * INNER, tokens * TOP_K / EXPERTS
        else:
            weights, own = matrix[part], float(tokens)
        layers = 1 if part == "head" else 6
        rows.append(own)
        hot_s.append(hot[tokens][part] / weights)
        if tokens not in cold:
            cold_s.append(hot_s[-1])
            continue
        seconds = max(hot_s[-1], cold[tokens].parts[part] / (weights * layers))
        waiting = 1.0 - (hot_s[-1] / seconds) ** 2
        cold_s.append(seconds * (1 + waiting * (cold[tokens].bandwidth / usual - 1)))
    return Curve(rows, cold_s, hot_s)


def _decode_scores(engine: Engine) -> tuple[float, float]:
    """Seconds a multiplication of scores and values, and a number of a new row, of texts that each bring one token."""
    short, long = _attention_seconds(engine, _SHORT), _attention_seconds(engine, _LONG)
    per_token, own = _widths(engine)
    layers = len(engine.config.layers)
    score = max(0.0, long - short) / (_TEXTS * (_LONG - _SHORT) * per_token * layers)
    row = max(0.0, short - score * _TEXTS * _SHORT * per_token * layers) / (_TEXTS * own * layers)
    return score, row


def _attention_seconds(engine: Engine, length: int) -> float:
    texts = [Text() for _ in range(_TEXTS)]
    for text in texts:
        for start in range(0, length, _PIECE):
            engine.step([Piece(text, [1] * min(_PIECE, length - start), "none")])
    samples = []
    for _ in range(9):
        engine.program.native.reset_times()
        engine.step([Piece(text, [1]) for text in texts])
        samples.append(_times(engine)["attention"])
        for text in texts:
            engine.cache.cut(text, length)
    for text in texts:
        engine.free(text)
    return statistics.median(samples)


def _prompt_scores(engine: Engine) -> tuple[float, float]:
    """The same of prompts, whose queries share what they read: from a short one and a longer one."""
    short, long = _prompt_seconds(engine, _PIECE // 4), _prompt_seconds(engine, _PIECE)
    per_token, own = _widths(engine)
    layers = len(engine.config.layers)
    seen = {length: length * (length + 1) / 2 for length in (_PIECE // 4, _PIECE)}
    score = max(0.0, long - 4 * short) / ((seen[_PIECE] - 4 * seen[_PIECE // 4]) * per_token * layers)
    return score, max(0.0, long - score * seen[_PIECE] * per_token * layers) / (_PIECE * own * layers)


def _prompt_seconds(engine: Engine, length: int) -> float:
    samples = []
    for _ in range(5):
        text = Text()
        engine.program.native.reset_times()
        engine.step([Piece(text, [1] * length, "none")])
        samples.append(_times(engine)["attention"])
        engine.free(text)
    return statistics.median(samples)


def _widths(engine: Engine) -> tuple[float, float]:
    """Multiplications for each token that a new one sees, and numbers of a new row, in one layer."""
    attention = engine.config.layers[0].attention
    kind = type(attention).__name__
    if kind == "MlaConfig":
        latent, rope, heads = attention.latent_rank, attention.rope_dim, attention.num_heads  # pyright: ignore[reportAttributeAccessIssue]
        return heads * (2 * latent + rope), heads * rope + latent + rope
    heads, groups, size = attention.num_heads, attention.num_key_value_heads, attention.head_dim  # pyright: ignore[reportAttributeAccessIssue]
    return heads * 2 * size, (heads + 2 * groups) * size


def _outside(engine: Engine) -> tuple[float, float]:
    """Seconds of a step that are no kernel's: of any step, and of each text in it, choosing tokens left out."""

    def once(count: int) -> float:
        texts = [Text() for _ in range(count)]
        engine.program.native.reset_times()
        start = time.perf_counter()
        engine.step([Piece(text, [1]) for text in texts])
        seconds = time.perf_counter() - start - sum(_times(engine).values())
        for text in texts:
            engine.free(text)
        return seconds

    one, many = (statistics.median(once(count) for _ in range(15)) for count in (1, 17))
    return one, max(0.0, many - one) / 16


def _seconds_of_a_logit() -> float:
    logits, greedy = torch.zeros(16, 32768), Sampling()
    generator = greedy.generator()
    return _median(lambda: sample(logits, greedy, generator)) / logits.numel()


def _median(run: Callable[[], object]) -> float:
    times = []
    for _ in range(9):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _cache_curve(probe: WatchedProbe) -> tuple[list[float], list[float]]:
    """Bytes a second of reading so many bytes again and again: from a quarter of the last cache to far beyond it."""
    cache = max(2**22, last_cache_bytes())
    sizes, rates = [], []
    for factor in (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0):
        size = max(64, min(probe.probe.num_bytes, int(cache * factor)) // 64 * 64)
        probe.bandwidth(size)
        sizes.append(float(size))
        rates.append(statistics.median(probe.bandwidth(size) for _ in range(5)))
    return sizes, rates


_BASE = """
import torch
from moesaic.bench.made_up import made_up_config, made_up_engine
from moesaic.train.memory import peak_memory_bytes
made_up_engine(made_up_config(layers=1, dense=True)).generate([1, 2, 3], 2)
print(peak_memory_bytes(torch.device("cpu")))
"""


def _base_bytes() -> float:
    """The most that a process takes which runs the engine on next to nothing, less what that model holds."""
    done = subprocess.run([sys.executable, "-c", _BASE], capture_output=True, text=True, timeout=600, check=True)
    held = 2.0 * made_up_config(layers=1, dense=True).total
    return float(done.stdout) - held


def _machine(measured: Measured, rates: KernelRates) -> Machine:
    """As an entry among the others: rates as they were measured, so that nothing is taken off them."""
    peaks: dict[Number, float] = {number: peak for number, peak in measured.peaks.items() if peak}
    device = Device(
        name="here",
        kind="cpu",
        memory_bytes=float(available_bytes() or 0),
        bandwidth=rates.bandwidth,
        flops=peaks,
        source=f"{measured.processor}, {measured.threads} threads, {measured.isa}: measured",
        date=_today(),
        efficiency=Efficiency(memory=1.0, compute=1.0, network=1.0, kernel_s=rates.layer / 10),
    )
    return Machine(device=device)


def _keep(found: Here) -> None:
    device = found.machine.device
    entry = {
        "memory_bytes": device.memory_bytes, "bandwidth": device.bandwidth, "flops": dict(device.flops),
        "source": device.source, "date": device.date, "kernel_s": device.efficiency.kernel_s,
    }  # fmt: skip
    path = here_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": entry, "kernels": found.rates.to_dict()}), encoding="utf-8")


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
