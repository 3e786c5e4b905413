"""This machine as a planner needs it: what it reads and computes, and how long our kernels take, each by itself.

Everything is timed on made-up models (see made_up.py), never on one that is planned; all of it in several passes, so
that samples of one thing lie seconds apart, and no mood of the machine is all of them. Medians are taken all over: what
is foretold is held against medians, too.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
from typing import NamedTuple

from moesaic.bench.kernel_times import SETTINGS, Kernels, Usual
from moesaic.bench.machine import Machine as Measured
from moesaic.bench.machine import measure_machine
from moesaic.bench.made_up import ATTENTIONS, NARROW, WIDE, made_up_config
from moesaic.bench.probes import Probes
from moesaic.bench.small_times import Attentions, Steps, norm_times, route_times
from moesaic.engine.memory import available_bytes
from moesaic.plan.hardware import Device, Efficiency, Machine, Number, here_file
from moesaic.plan.kernels import slenderness
from moesaic.plan.rates import Curve, KernelRates, Speeds

PASSES = 3


class Here(NamedTuple):
    """This machine, and its kernels' times."""

    machine: Machine
    rates: KernelRates


def measure(threads: int | None = None, *, keep: bool = True) -> Here:
    """Time memory, products and kernels; takes about half a minute. keep: for later plans, in the state folder.

    Other programs make it wrong: `rates.busy` says so where there were any.
    """
    threads = threads or _threads()
    measured, bench = measure_machine(threads), _Bench(threads)
    for _ in range(PASSES):
        bench.sample()
    rates = bench.rates(measured)
    found = Here(_machine(measured, rates), rates)
    if keep:
        _keep(found)
    return found


class _Bench:
    """All that is timed, and what a pass over it has found."""

    def __init__(self, threads: int) -> None:
        self._probes = probes = Probes(threads)
        self._wide = [Kernels(probes, setting, WIDE, "4", threads) for setting in SETTINGS.values()]
        self._narrow = [Kernels(probes, setting, NARROW, "latent", threads) for setting in SETTINGS.values()]
        self._attentions = Attentions(probes, threads)
        quickest = list(SETTINGS).index("int4")
        self._steps = Steps(probes, self._wide[quickest].far, self._narrow[quickest].far)
        self._speeds: list[Speeds] = []

    def sample(self) -> None:
        """Everything once; kernels of all settings in turns."""
        for wide, narrow in zip(self._wide, self._narrow, strict=True):
            self._speeds.append(self._probes.speeds())
            wide.sample()
            narrow.sample()
        self._attentions.sample()
        self._steps.sample()

    def rates(self, measured: Measured) -> KernelRates:
        """Medians of all passes."""
        usual = Usual(
            statistics.median(each.bandwidth for each in self._speeds),
            statistics.median(each.compute for each in self._speeds),
        )
        return KernelRates(
            bandwidth=usual.bandwidth,
            compute=usual.compute,
            sizes=self._probes.sizes,
            bandwidths=[statistics.median(sizes) for sizes in zip(*(each.near for each in self._speeds), strict=True)],
            linear=_curves(self._wide, "projections", "linear", usual),
            latent=_curves(self._narrow, "projections", "linear", usual),
            experts=_curves(self._wide, "experts", "experts", usual),
            fine=_curves(self._narrow, "experts", "experts", usual),
            head=_curves(self._wide, "head", "head", usual),
            slender=(slenderness(WIDE.hidden, WIDE.inner), slenderness(NARROW.hidden, NARROW.inner)),
            decode={kind: self._attentions.decode(kind, usual) for kind in ATTENTIONS},
            prompt={kind: self._attentions.prompt(kind, usual) for kind in ATTENTIONS},
            norm=norm_times(self._wide, usual),
            route=route_times([*self._wide, *self._narrow], usual),
            outside=self._steps.outside(usual),
            base_bytes=_base_bytes(),
            about={
                "processor": measured.processor,
                "threads": measured.threads,
                "isa": measured.isa,
                "date": _today(),
                "share": self._probes.watched.share,
                "spread": self._probes.watched.spread,
            },
        )


def _curves(kernels: list[Kernels], part: str, packed: str, usual: Usual) -> dict[str, Curve]:
    """By what a part is made of, of the first setting that has it."""
    curves: dict[str, Curve] = {}
    for each in kernels:
        packing = getattr(each.setting, packed)
        if packing not in curves:
            curves[packing] = each.curve(part, usual)
    return curves


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
        efficiency=Efficiency(memory=1.0, compute=1.0, network=1.0, kernel_s=rates.norm[0]),
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
