"""The first line of a plan: what binds, by how much, and what would relieve it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple, TypeVar

from moesaic.errors import ConfigError
from moesaic.plan.formats import named
from moesaic.plan.hardware import Machine
from moesaic.plan.memory import DeviceMemory
from moesaic.plan.serving import Serving, make_serving
from moesaic.plan.training import TrainingRun, make_training

_T = TypeVar("_T")

_MOST_DEVICES = 4096
_WORTH_IT = 0.97  # of a step's time: what is above gains next to nothing
_NARROWER = ("fp8", "int8", "mxfp4", "int4")
_DOES = {
    "bandwidth": "reading memory",
    "compute": "computing",
    "network": "sending between devices",
    "launches": "starting operations",
}


class Relief(NamedTuple):
    """A change, and what it makes of the figure that binds, as a factor of what it is now."""

    words: str
    factor: float


class Verdict(NamedTuple):
    """What binds: "capacity", "bandwidth", "compute", "network" or "launches". share: of the step, or how many times
    what there is is needed; reliefs: the best first."""

    binds: str
    share: float
    line: str
    reliefs: tuple[Relief, ...]


def serving_verdict(serving: Serving) -> Verdict:
    """Capacity where it does not fit, else what most of a decode step goes to."""
    memory = serving.memory
    if not memory.fits:
        found = tuple(_room(serving))
        return _short(memory, _device_name(serving.machine), found, _texts(serving.users, serving.context))
    step = serving.decode()
    limits = step.limits
    by, share = step.bound_by, limits[step.bound_by] / sum(limits.values())
    largest = max(step.ops, key=lambda op: op.seconds)
    reliefs = tuple(sorted(_speed(serving, step.seconds), key=lambda relief: relief.factor)[:3])
    line = (
        f"{by} binds: {share:.0%} of a decode step of {_ms(step.seconds)} goes to {_DOES[by]} "
        f"({largest.op.name} take {largest.seconds / step.working:.0%} of the work){_listed(reliefs)}"
    )
    return Verdict(by, share, line, reliefs)


def training_verdict(run: TrainingRun) -> Verdict:
    """The same of a training step."""
    memory = run.memory
    if not memory.fits:
        return _short(memory, _device_name(run.machine), tuple(_room_to_train(run)), "training it so")
    forward = run.forward()
    by, limits = forward.bound_by, forward.limits
    share = limits[by] / sum(limits.values())
    line = (
        f"{by} binds: {share:.0%} of a forward pass goes to {_DOES[by]}; "
        f"a step reaches {run.flops_utilisation:.0%} of the devices' stated rate"
    )
    return Verdict(by, share, line, ())


def _short(memory: DeviceMemory, device: str, reliefs: tuple[Relief, ...], what: str) -> Verdict:
    largest = max(memory.parts, key=lambda part: memory.parts[part])
    line = (
        f"capacity binds: {what} take {_gb(memory.total)} on the fullest {device}, which has {_gb(memory.capacity)}: "
        f"{_gb(-memory.free)} short ({largest}: {_gb(memory.parts[largest])}){_fitting(reliefs, memory)}"
    )
    return Verdict("capacity", memory.total / memory.capacity, line, reliefs)


def _listed(reliefs: tuple[Relief, ...]) -> str:
    words = [f"{each.words} ({each.factor - 1:+.0%})" for each in reliefs]
    return f"; would relieve it: {', or '.join(words)}" if words else ""


def _fitting(reliefs: tuple[Relief, ...], memory: DeviceMemory) -> str:
    """Nothing that was tried: the least memory that holds it as it is."""
    if not reliefs:
        return f"; nothing tried here fits: it takes devices of {_gb(memory.total)} or more"
    return f"; would fit: {', or '.join(each.words for each in reliefs)}"


def _device_name(machine: Machine) -> str:
    return f"{machine.device.name} of {machine.count}" if machine.count > 1 else machine.device.name


def _room(serving: Serving) -> Iterator[Relief]:
    """What would make it fit: fewer texts, less context, narrower formats, more devices; each alone."""
    total = serving.memory.total
    most = serving.most_users or _most_spread_otherwise(serving)
    if most:
        yield Relief(f"{most:,} text{'s' * (most > 1)} at once", most / serving.users)
    elif (shorter := _longest_context(serving)) > 0:
        yield Relief(f"one text of {shorter:,} tokens", shorter / serving.context)
    for name in _NARROWER:
        other = _tried(lambda name=name: _again(serving, format_=name))
        if other is not None and other.memory.fits:
            yield Relief(f"{name} weights", other.memory.total / total)
            break
    count = smallest_count(serving)
    if count is not None and count > serving.machine.count:
        yield Relief(f"{count}x{serving.machine.device.name}", count / serving.machine.count)


def _most_spread_otherwise(serving: Serving) -> int:
    """Texts that fit in the layout that is best for one; 0: not even that."""
    one = _tried(lambda: _again(serving, users=1, machine=serving.machine))
    return min(serving.users - 1, one.most_users) if one is not None and one.memory.fits else 0


def smallest_count(serving: Serving) -> int | None:
    """The fewest devices of this kind, a power of two of them, that hold the model and its texts; None: too many."""
    count = 1
    while count <= (_MOST_DEVICES if serving.machine.device.joins else 1):
        machine = replace(serving.machine, count=count)
        other = _tried(lambda machine=machine: _again(serving, machine=machine))
        if other is not None and other.memory.fits:
            return count
        count *= 2
    return None


def _longest_context(serving: Serving) -> int:
    """The longest context of one text a copy that fits, in steps of halving; 0: none."""
    context = serving.context
    while context > 64:
        context //= 2
        if replace(serving, context=context, users=serving.layout.dp).memory.fits:
            return context
    return 0


def _speed(serving: Serving, seconds: float) -> Iterator[Relief]:
    """What would make a decode step shorter: the best of the narrower formats, and one each of other ways."""
    narrower = [relief for name in _NARROWER if (relief := _gain(f"{name} weights", _narrower(serving, name), seconds))]
    yield from sorted(narrower, key=lambda relief: relief.factor)[:1]
    changes: list[tuple[str, Callable[[], Serving]]] = []
    if serving.formats.cache == "bf16":
        changes.append(("an FP8 cache", lambda: replace(serving, formats=replace(serving.formats, cache="fp8"))))
    if serving.machine.device.joins:
        more = replace(serving.machine, count=2 * serving.machine.count)
        changes.append((f"{more.name}", lambda: _again(serving, machine=more)))
    if serving.layout.devices > 1 and serving.overlap < 1:
        changes.append(("overlapping sending and computing", lambda: replace(serving, overlap=1.0)))
    for words, change in changes:
        if relief := _gain(words, change, seconds):
            yield relief


def _narrower(serving: Serving, name: str) -> Callable[[], Serving]:
    return lambda: _again(serving, format_=name)


def _gain(words: str, change: Callable[[], Serving], seconds: float) -> Relief | None:
    """A change by what it makes of a step; None where that is next to nothing, or does not fit."""
    other = _tried(change)
    if other is None or not other.memory.fits:
        return None
    factor = other.decode().seconds / seconds
    return Relief(words, factor) if factor < _WORTH_IT else None


def _again(
    serving: Serving, *, format_: str | None = None, machine: Machine | None = None, users: int | None = None
) -> Serving:
    """The same with other weights, or on other devices, in the layout that is best there."""
    formats = serving.formats if format_ is None else named(format_, serving.formats.cache)
    return make_serving(
        serving.config,
        formats,
        machine or serving.machine,
        context=serving.context,
        users=serving.users if users is None else users,
        layout=serving.layout if machine is None else None,
        routing=serving.routing,
        speculation=serving.speculation,
        overlap=serving.overlap,
    )


def _room_to_train(run: TrainingRun) -> Iterator[Relief]:
    total = run.memory.total
    for recompute in ("experts", "layers"):
        other = replace(run, training=replace(run.training, recompute=recompute))
        if other.memory.fits:
            yield Relief(f"recompute={recompute}", other.memory.total / total)
            break
    count = run.machine.count
    while run.machine.device.joins and count < _MOST_DEVICES:
        count *= 2
        machine = replace(run.machine, count=count)
        other = _tried(
            lambda machine=machine: make_training(
                run.config, machine, run.training, sequence_length=run.sequence_length, batch_tokens=run.batch_tokens
            )
        )
        if other is not None and other.memory.fits:
            yield Relief(f"{count}x{run.machine.device.name}", count / run.machine.count)
            return


def _tried(make: Callable[[], _T]) -> _T | None:
    """What comes of a change; None where the model cannot be spread so."""
    try:
        return make()
    except ConfigError:
        return None


def _texts(count: int, context: int) -> str:
    return f"{count:,} text{'s' * (count > 1)} of {context:,} tokens and the model"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"
