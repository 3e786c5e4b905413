"""What a report shows, as plain data that goes to JSON and back: a run folder can rebuild its page."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.errors import DataError
from moesaic.telemetry.load import StepLoad


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """One evaluation while training: how much had been spent, and the bits per byte on held-out text."""

    step: int
    tokens: int
    flops: float
    seconds: float
    bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """One model of the comparison. Unknown numbers are NaN; `label` is a short name for the ends of lines.

    training_loss holds (tokens, loss in nats per token). peak_memory_bytes is the process's while this model trained.
    capacity_gap: how many more bits per byte it last lost with rows dropped as in training.
    """

    name: str
    label: str
    note: str = ""
    total_parameters: int
    active_parameters: int
    bits_per_byte: float
    domain_bits_per_byte: Mapping[str, float]
    training_tokens: int
    training_tokens_per_s: float
    decoding_tokens_per_s: float
    peak_memory_bytes: float
    training_time_s: float
    training_flops: float
    held_out: tuple[HeldOut, ...] = ()
    training_loss: tuple[tuple[float, float], ...] = ()
    capacity_gap: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A sentence computed from the run, and whether it is good news (None: neither)."""

    text: str
    is_good: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A prompt and what the model made of it."""

    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command to type next, and what it does."""

    line: str
    purpose: str


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything on the page. `domains` names the rows of the loads' domain counts.

    loads: the MoE's load at each recorded step, oldest first. domain_load: its load over held-out text, told apart by
    domain. facts: (name, value) pairs about the run: machine, corpus, seed.
    """

    title: str
    subtitle: str = ""
    verdicts: tuple[Verdict, ...] = ()
    models: tuple[ModelResult, ...] = ()
    domains: tuple[str, ...] = ()
    loads: tuple[StepLoad, ...] = ()
    domain_load: StepLoad | None = None
    continuations: tuple[Continuation, ...] = ()
    commands: tuple[Command, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; NaN becomes null."""
        return _to_json(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "ReportData":
        """The inverse of `to_json`. Raises DataError for a tree that is not a report's."""
        try:
            return cls(
                title=tree["title"],
                subtitle=tree["subtitle"],
                verdicts=tuple(Verdict(**verdict) for verdict in tree["verdicts"]),
                models=tuple(_model(model) for model in tree["models"]),
                domains=tuple(tree["domains"]),
                loads=tuple(StepLoad.from_json(load) for load in tree["loads"]),
                domain_load=StepLoad.from_json(tree["domain_load"]) if tree["domain_load"] else None,
                continuations=tuple(Continuation(**sample) for sample in tree["continuations"]),
                commands=tuple(Command(**command) for command in tree["commands"]),
                facts=tuple((name, value) for name, value in tree["facts"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not the data of a report ({error!r}); write it with ReportData.to_json") from error


def _model(tree: dict[str, Any]) -> ModelResult:
    fields: dict[str, Any] = {name: math.nan if value is None else value for name, value in tree.items()}
    fields["domain_bits_per_byte"] = {name: _number(value) for name, value in tree["domain_bits_per_byte"].items()}
    fields["held_out"] = tuple(
        HeldOut(**{name: _number(value) for name, value in point.items()}) for point in tree["held_out"]
    )
    fields["training_loss"] = tuple((_number(tokens), _number(loss)) for tokens, loss in tree["training_loss"])
    return ModelResult(**fields)


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def _to_json(value: Any) -> Any:
    if isinstance(value, StepLoad):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return {field.name: _to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _to_json(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
