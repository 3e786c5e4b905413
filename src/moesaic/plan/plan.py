"""The whole plan of a model on a machine: fits it, how fast, how much, and would a dense model do?"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from moesaic.checks import require
from moesaic.config import ModelConfig
from moesaic.errors import ConfigError
from moesaic.hub.resolve import describe_config
from moesaic.plan.cost import Price, ServingCost, TrainingCost, Workload, serving_cost
from moesaic.plan.dense import Crossover, Equal, crossover, dense_equals
from moesaic.plan.files import formats_of_files
from moesaic.plan.flops import Step
from moesaic.plan.formats import Formats, as_released, named, total_bytes
from moesaic.plan.hardware import Machine, find_machine
from moesaic.plan.kernels import EngineStep, engine_step
from moesaic.plan.kinds import with_shared_layers
from moesaic.plan.layout import Layout
from moesaic.plan.lifetime import Lifetime, lifetime
from moesaic.plan.memory import DeviceMemory, Training
from moesaic.plan.offload import Offload, offload
from moesaic.plan.rates import measured_rates
from moesaic.plan.roofline import Speculation, StepTime
from moesaic.plan.routing import Routing
from moesaic.plan.serving import CurvePoint, Serving, batch_curve, check_context, make_serving
from moesaic.plan.training import TrainingRun, make_training
from moesaic.plan.verdict import Verdict, serving_verdict, smallest_count, training_verdict

Task = Literal["serve", "train"]
DEFAULT_DEVICE = "h100"
CONTEXT = 8192
HERE = "here"


class EngineTimes(NamedTuple):
    """Of moesaic's engine: a decode step of all users, and prompt tokens a second, by kernels measured one by one."""

    decode: EngineStep
    prompt_rate: float


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """A plan for answering. offload: where experts lie that do not fit; None where all fit, or nothing holds them.

    engine: on a machine whose kernels were measured, what moesaic's own engine takes, or why that is not known; None
    elsewhere.
    dense: against dense models of equal active size, quality and total size; empty for a dense model.
    lifetime: training on a budget of tokens, then serving; None without a budget.
    """

    model: str
    serving: Serving
    verdict: Verdict
    memory: DeviceMemory
    most_users: int
    decode: StepTime
    prefill: StepTime
    first_token_s: float
    tokens_per_second: float
    curve: tuple[CurvePoint, ...]
    dense: Mapping[Equal, Crossover]
    cost: ServingCost
    workload: Workload
    utilisation: float
    prices: tuple[Price, ...]
    offload: Offload | None
    engine: EngineTimes | str | None = None
    lifetime: Lifetime | None = None

    @property
    def fits(self) -> bool:
        return self.memory.fits

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        serving, decode, prefill = self.serving, self.decode, self.prefill
        return {
            "model": self.model,
            "task": "serve",
            "verdict": _verdict(self.verdict),
            "fits": self.fits,
            **_setting(serving.config, serving.formats, serving.machine, serving.layout),
            "context": serving.context,
            "users": serving.users,
            "routing": serving.routing.name,
            "speculation": asdict(serving.speculation),
            "memory": _memory(self.memory),
            "most_users": self.most_users,
            "decode": _step(decode),
            "prefill": _step(prefill) | {"tokens_per_second": prefill.step.tokens / prefill.seconds},
            "first_token_s": self.first_token_s,
            "tokens_per_second": self.tokens_per_second,
            "curve": [point._asdict() for point in self.curve],
            "dense": {name: found._asdict() | {"in_words": found.in_words} for name, found in self.dense.items()},
            "utilisation": self.utilisation,
            "workload": asdict(self.workload),
            "cost": asdict(self.cost),
            "prices": [asdict(price) | {"month": price.month(self.workload)} for price in self.prices],
            "engine": _engine(self.engine),
            "offload": None if self.offload is None else _offload(self.offload, decode.seconds),
            "lifetime": None if self.lifetime is None else _lifetime(self.lifetime),
        }


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A plan for learning. cost: of the budget of tokens; None where there is none."""

    model: str
    run: TrainingRun
    verdict: Verdict
    memory: DeviceMemory
    step_s: float
    tokens_per_second: float
    flops_utilisation: float
    cost: TrainingCost | None

    @property
    def fits(self) -> bool:
        return self.memory.fits

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        run = self.run
        return {
            "model": self.model,
            "task": "train",
            "verdict": _verdict(self.verdict),
            "fits": self.fits,
            **_setting(run.config, run.formats, run.machine, run.layout),
            "sequence_length": run.sequence_length,
            "batch_tokens": run.batch_tokens,
            "training": asdict(run.training),
            "memory": _memory(self.memory),
            "forward": _step(run.forward()),
            "step_s": self.step_s,
            "tokens_per_second": self.tokens_per_second,
            "flops_utilisation": self.flops_utilisation,
            "cost": None if self.cost is None else asdict(self.cost),
        }


def read_model(model: str | os.PathLike[str] | ModelConfig) -> tuple[str, ModelConfig]:
    """A name and the description of a preset, a folder, a config.json, a .gguf file, or a description as it is."""
    if isinstance(model, ModelConfig):
        return model.family, with_shared_layers(model)
    return os.fspath(model), with_shared_layers(describe_config(model))


def make_plan(
    model: str | os.PathLike[str] | ModelConfig,
    *,
    machine: str | Machine | None = None,
    task: Task = "serve",
    format: str | Formats | None = None,
    cache: str = "bf16",
    context: int | None = None,
    users: int = 1,
    layout: Layout | None = None,
    routing: Routing | None = None,
    speculation: Speculation | None = None,
    overlap: float | None = None,
    workload: Workload | None = None,
    utilisation: float = 0.5,
    prices: tuple[Price, ...] = (),
    quality: float | None = None,
    training: Training | None = None,
    batch_tokens: float | None = None,
    train_tokens: float | None = None,
    train_machine: str | None = None,
    served: float | None = None,
) -> ServingPlan | TrainingPlan:
    """What a model needs of a machine and gets from it. Loads no weights and no torch.

    machine: "8xh100", a Machine, or None: as few H100 as hold it. format: see formats.named; None: as its files have
    it, or as it was released.
    context: tokens of a text, or of a training sequence; None: 8,192, or what the model takes. users: texts at once.
    layout: None: the best of the usual ones. routing: None: even. quality: parameters of a dense model as good.
    overlap: the share of the shorter of computing and sending that hides behind the longer; None: 0 serving, 0.5
    training. train_tokens: a budget; with task "serve" the cost of a whole life is counted: training on train_machine
    (None: where it serves), then writing `served` output tokens (None: the workload's in three years).
    Raises ConfigError or CheckpointError for a model, machine, format, layout or context that cannot be.
    """
    require(overlap is None or 0 <= overlap <= 1, f"overlap={overlap}; use a share from 0 to 1")
    name, config = read_model(model)
    formats = _formats(model, config, format, cache)
    tokens = context if context is not None else min(CONTEXT, config.context_length)
    if task == "train":
        found = machine if isinstance(machine, Machine) else find_machine(machine or f"8x{DEFAULT_DEVICE}")
        kept = training or Training()
        run = make_training(
            config, found, kept, sequence_length=tokens if context else min(4096, tokens),
            batch_tokens=batch_tokens, layout=layout, routing=routing,
            precision="fp8" if formats.of("experts").products == "fp8" else "bf16",
        )  # fmt: skip
        return _training_plan(name, run if overlap is None else replace(run, overlap=overlap), train_tokens)
    if task != "serve":
        raise ConfigError(f"task {task!r}; known: serve, train")
    check_context(config, tokens)
    settings: dict[str, Any] = {
        "context": tokens, "users": users, "routing": routing, "speculation": speculation, "overlap": overlap or 0.0,
    }  # fmt: skip
    found = machine if isinstance(machine, Machine) else _machine(machine, config, formats, settings)
    serving = make_serving(config, formats, found, layout=layout, **settings)
    plan = _serving_plan(name, serving, workload or Workload(), utilisation, prices, quality)
    if train_tokens is None:
        return plan
    whole = lifetime(
        serving, tokens=train_tokens, workload=plan.workload, utilisation=utilisation, served=served, prices=prices,
        machine=None if train_machine is None else find_machine(train_machine), quality=quality,
    )  # fmt: skip
    return replace(plan, lifetime=whole)


def _formats(
    model: str | os.PathLike[str] | ModelConfig, config: ModelConfig, wanted: str | Formats | None, cache: str
) -> Formats:
    if isinstance(wanted, Formats):
        return wanted
    if wanted is not None:
        return named(wanted, cache)
    if isinstance(model, ModelConfig):
        return named(as_released(config.family), cache)
    return formats_of_files(model, config, cache)


def _machine(text: str | None, config: ModelConfig, formats: Formats, settings: dict[str, Any]) -> Machine:
    """What is named, or as few of the default device as hold the model."""
    if text is not None:
        return find_machine(text)
    machine = find_machine(DEFAULT_DEVICE)
    count = smallest_count(make_serving(config, formats, machine, **settings))
    if count is None:
        raise ConfigError(f"no number of {DEFAULT_DEVICE} holds this; name a --machine, or ask for fewer users")
    return replace(machine, count=count)


def _serving_plan(
    name: str,
    serving: Serving,
    workload: Workload,
    utilisation: float,
    prices: tuple[Price, ...],
    quality: float | None,
) -> ServingPlan:
    config, device = serving.config, serving.machine.device
    most = serving.most_users
    rates = serving.rates()
    dense: dict[Equal, Crossover] = {}
    if config.moe_layers and config.encoder is None:
        for equal, model in dense_equals(config, quality).items():
            dense[equal] = crossover(
                config, model, serving.formats, device, serving.context / 2, serving.layout, serving.routing
            )
    memory = serving.memory
    return ServingPlan(
        model=name,
        serving=serving,
        verdict=serving_verdict(serving),
        memory=memory,
        most_users=most,
        decode=serving.decode(),
        prefill=serving.prefill(),
        first_token_s=serving.first_token(),
        tokens_per_second=rates.decode,
        curve=tuple(batch_curve(serving, most)),
        dense=dense,
        cost=serving_cost(rates, workload, utilisation),
        workload=workload,
        utilisation=utilisation,
        prices=prices,
        offload=_offloaded(serving, memory),
        engine=_engine_times(serving),
    )


def _engine_times(serving: Serving) -> EngineTimes | str | None:
    """By measured kernels; None where none were. For what the engine does not run, or was not timed, why."""
    rates = measured_rates() if serving.machine.device.name == HERE else None
    if rates is None:
        return None
    formats = replace(
        serving.formats, by_role={role: _held.get(name, name) for role, name in serving.formats.by_role.items()}
    )
    step = Step(kind="decode", texts=serving.users, new=1, context=max(1, serving.context // 2))
    prompt = min(512, serving.context)
    try:
        read = engine_step(rates, serving.config, formats, Step(kind="prefill", texts=1, new=prompt, context=prompt))
        return EngineTimes(
            engine_step(rates, serving.config, formats, step, routing=serving.routing), prompt / read.seconds
        )
    except ConfigError as error:
        return f"not known: {error}"


def _engine(found: EngineTimes | str | None) -> dict[str, Any] | str | None:
    return found._asdict() | {"decode": found.decode._asdict()} if isinstance(found, EngineTimes) else found


_held = {"fp8": "fp8-128"}
"""How the engine holds what files have."""


def _offloaded(serving: Serving, memory: DeviceMemory) -> Offload | None:
    """Where experts go that do not fit, if there is a memory behind the devices."""
    experts = memory.parts.get("weights: experts", 0.0)
    if memory.fits or not experts:
        return None
    near = max(0.0, experts + memory.free) * serving.machine.count
    return offload(serving.config, serving.formats, serving.machine, near, serving.users, routing=serving.routing)


def _training_plan(name: str, run: TrainingRun, tokens: float | None) -> TrainingPlan:
    return TrainingPlan(
        model=name,
        run=run,
        verdict=training_verdict(run),
        memory=run.memory,
        step_s=run.seconds,
        tokens_per_second=run.tokens_per_second,
        flops_utilisation=run.flops_utilisation,
        cost=None if tokens is None else run.cost(tokens),
    )


def _setting(config: ModelConfig, formats: Formats, machine: Machine, layout: Layout) -> dict[str, Any]:
    device = machine.device
    return {
        "assumed": getattr(config, "assumed", "") or None,
        "parameters": {"total": config.total, "active_gemm": config.active_gemm, "active_all": config.active_all},
        "format": formats.name,
        "cache_format": formats.cache,
        "weight_bytes": total_bytes(config, formats),
        "machine": machine.name,
        "device": {
            name: getattr(device, name)
            for name in ("name", "memory_bytes", "bandwidth", "link", "network", "price", "watts", "source", "date")
        },
        "efficiency": asdict(device.efficiency),
        "layout": asdict(layout) | {"in_words": str(layout)},
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return verdict._asdict() | {"reliefs": [relief._asdict() for relief in verdict.reliefs]}


def _memory(memory: DeviceMemory) -> dict[str, Any]:
    return {"parts": memory.parts, "total": memory.total, "capacity": memory.capacity, "free": memory.free}


def _step(time: StepTime) -> dict[str, Any]:
    return {
        "texts": time.step.texts,
        "tokens": time.step.tokens,
        "context": time.step.context,
        "seconds": time.seconds,
        "bound_by": time.bound_by,
        "limits": time.limits,
        "sending_s": time.sending,
        "traffic": time.traffic._asdict(),
        "operations": [
            op.op._asdict() | {"seconds": op.seconds, "by": op.by, "intensity": op.op.intensity} for op in time.ops
        ],
    }


def _lifetime(found: Lifetime) -> dict[str, Any]:
    return {
        **{name: getattr(found, name) for name in ("training_machine", "served", "months", "per_million", "total")},
        "training": asdict(found.training),
        "others": [other._asdict() for other in found.others],
    }


def _offload(found: Offload, step_s: float) -> dict[str, Any]:
    return {
        "tiers": [asdict(tier) for tier in found.tiers],
        "hit": found.hit,
        "missed_bytes": found.missed_bytes,
        "fetching_s": found.seconds,
        "step_s": step_s + found.seconds,
        "computed_on_host": found.computed_on_host,
    }
