"""Profiles a few steps of a run: a trace for Perfetto (https://ui.perfetto.dev) or Chrome, and where the time went.

It acts from outside: module hooks and the profiler are there only during the profiled steps, and change no bit.
"""

import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from moesaic.errors import ConfigError, RunFolderError
from moesaic.experts.grouped import GroupedExperts
from moesaic.layers.attention import Attention
from moesaic.layers.mla import LatentAttention
from moesaic.layers.mlp import Mlp
from moesaic.layers.moe import MoeLayer, RouterLayer
from moesaic.layers.norm import LayerNorm, RmsNorm
from moesaic.models.decoder import DecoderLayer
from moesaic.train.loop import Trainer
from moesaic.train.phases import STEP, PhaseTime, Span, annotation, phase_times, spans
from moesaic.train.reports import StepReport

WARM_UP_STEPS = 2  # not profiled: the first steps make buffers and choose kernels
DEFAULT_STEPS = 3

# Outer modules keep what their inner ones do not claim; below the others everything is theirs.
_OUTER: dict[type[nn.Module], str] = {DecoderLayer: "residual", MoeLayer: "moe, the rest"}
_INNER: dict[type[nn.Module], str] = {
    nn.Embedding: "embedding",
    RmsNorm: "norm",
    LayerNorm: "norm",
    Attention: "attention",
    LatentAttention: "attention",
    RouterLayer: "router",
    GroupedExperts: "experts",
    Mlp: "mlp",
}


class Profiled(NamedTuple):
    """What a profile found: where the trace is, and the mean milliseconds a step of every phase."""

    trace: Path
    first_step: int
    num_steps: int
    times: list[PhaseTime]

    @property
    def step_ms(self) -> float:
        """The mean milliseconds of a profiled step."""
        return sum(time.forward_ms + time.backward_ms for time in self.times)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready tree."""
        phases = [time._asdict() for time in self.times]
        return {
            "trace": str(self.trace),
            "first_step": self.first_step,
            "num_steps": self.num_steps,
            "step_ms": self.step_ms,
            "phases": phases,
        }


class StepProfiler:
    """Inside the block, `trainer.train_step` profiles `num_steps` steps after a warm-up; the trace goes to `place`.

    `found` is None until the steps are done; a run that ends before that leaves a trace of those that were.
    Raises ConfigError for a compiled model and for one on a GPU, RunFolderError when the trace cannot be written.
    """

    def __init__(self, trainer: Trainer, place: Path, num_steps: int = DEFAULT_STEPS) -> None:
        if num_steps < 1:
            raise ConfigError(f"--profile {num_steps}; give the number of steps to profile, 1 or more")
        if trainer.settings.compile:
            raise ConfigError(
                "--profile and train.compile=true: compiled phases cannot be told apart; "
                "add --set train.compile=false for the profile"
            )
        if trainer.device.type != "cpu":
            raise ConfigError(
                f"--profile tells apart what a CPU computes, and this run is on {trainer.device}; add "
                "--set train.device=cpu, or use torch.profiler"
            )
        self.trainer, self.place, self.num_steps = trainer, place, num_steps
        self.found: Profiled | None = None
        self._left_to_skip = WARM_UP_STEPS
        self._done = 0
        self._profiler: profile | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._train_step = self.trainer.train_step
        left = self.trainer.last_step - self.trainer.step
        self._left_to_skip = max(0, min(WARM_UP_STEPS, left - self.num_steps))
        self.trainer.train_step = self._step
        return self

    def __exit__(self, *failure: object) -> None:
        self.trainer.train_step = self._train_step
        if self._profiler is not None:
            self._finish()

    def _step(self) -> StepReport:
        if self._left_to_skip > 0:
            self._left_to_skip -= 1
            return self._train_step()
        if self.found is None and self._profiler is None:
            self._start()
        if self._profiler is None:
            return self._train_step()
        with record_function(STEP):
            report = self._train_step()
        self._done += 1
        if self._done == self.num_steps:
            self._finish()
        return report

    def _start(self) -> None:
        # Its default tells on stderr that it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        for name, phase, module in _annotated(self.trainer.model):
            self._hooks += _annotate(module, annotation(phase, name))
        self._optimizer_step = self.trainer.optimizer.step
        self.trainer.optimizer.step = _under(annotation("optimizer", "step"), self._optimizer_step)
        self._profiler = profile(activities=[ProfilerActivity.CPU])
        self._profiler.start()

    def _finish(self) -> None:
        assert self._profiler is not None
        profiler, self._profiler = self._profiler, None
        for hook in self._hooks:
            hook.remove()
        self.trainer.optimizer.step = self._optimizer_step
        profiler.stop()
        if self._done:
            found = write_trace(profiler, self.place)
            first = self.trainer.step - self._done + 1
            self.found = Profiled(self.place, first, self._done, phase_times(found, self._done))


def _under(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, standing under `name` in the trace."""

    def annotated(*arguments: Any, **options: Any) -> Any:
        with record_function(name):
            return function(*arguments, **options)

    return annotated


def write_trace(profiler: profile, place: Path) -> list[Span]:
    """Write the profiler's trace, compressed, with a track of phases above the others; returns the phases' spans.

    Raises RunFolderError when the disk says no.
    """
    try:
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".trace-") as folder:
            raw, new = Path(folder) / "raw.json", Path(folder) / "new.json.gz"
            profiler.export_chrome_trace(str(raw))
            tree = json.loads(raw.read_text(encoding="utf-8", errors="replace"))
            found = spans(tree["traceEvents"])
            tree["traceEvents"] += _track(found, tree["traceEvents"])
            with gzip.open(new, "wt", encoding="utf-8", compresslevel=5) as file:
                json.dump(tree, file)
            os.replace(new, place)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "the disk is full"
        raise RunFolderError(f"cannot write {place}: {why}; free space, or leave out --profile") from error
    return found


def _track(found: list[Span], events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The phases as a thread of their own, which sorts first."""
    process = next(event["pid"] for event in events if event.get("name") == STEP)
    where = {"pid": process, "tid": 1}  # a number that no thread of ours has
    yield {"ph": "M", "name": "thread_name", **where, "args": {"name": "phases"}}
    yield {"ph": "M", "name": "thread_sort_index", **where, "args": {"sort_index": -1}}
    for place, start_us, end_us in found:
        if place.phase == "between":
            continue
        name = f"{place.phase}, backward" if place.is_backward else place.phase
        args = {} if place.layer is None else {"layer": place.layer}
        yield {"ph": "X", "cat": "phase", "name": name, **where, "ts": start_us, "dur": end_us - start_us, "args": args}


def _annotated(module: nn.Module, name: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """(name, phase, module) of every module that stands for a phase."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if type(child) in _INNER:
            is_shared = isinstance(module, MoeLayer) and isinstance(child, Mlp)
            yield path, "shared experts" if is_shared else _INNER[type(child)], child
            continue
        if type(child) in _OUTER:
            yield path, _OUTER[type(child)], child
        yield from _annotated(child, path)


def _annotate(module: nn.Module, name: str) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that put the module's forward under `name` in the trace."""
    running: list[record_function] = []

    def begin(*_: object) -> None:
        region = record_function(name)
        region.__enter__()
        running.append(region)

    def end(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]
