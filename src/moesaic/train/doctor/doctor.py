"""When the doctor looks, what it does, and whether that helped."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from moesaic.models.decoder import Decoder
from moesaic.telemetry.load import StepLoad, sum_loads
from moesaic.telemetry.probe import LayerProbe, probe
from moesaic.train.doctor.findings import Finding, Key, findings_in
from moesaic.train.doctor.remedies import LADDERS, ONLY_TOLD, REMEDIES, WHAT, Patient, Treatment, mute_experts
from moesaic.train.doctor.surgery import Kept
from moesaic.train.optimizer import Optimizer
from moesaic.train.random_state import undisturbed

Mode = Literal["off", "advise", "act"]
Line = dict[str, Any]
WORSE = "the held-out loss got worse"


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """every: steps between looks, whose loads are judged together. patience: looks in a row that must find the same.
    course: steps between a treatment and its judgement by the held-out loss. rest: steps at the beginning in which
    nobody looks. last: the run's last step; no course begins that could not be judged by then. worse: the part by which
    the held-out loss may be higher after a course than before it; at_once: right after a treatment.
    """

    every: int = 20
    patience: int = 2
    course: int = 40
    rest: int = 0
    last: int | None = None
    worse: float = 0.002
    at_once: float = 0.05


class Trained(Protocol):
    """What the doctor needs of a stepper: the model, what is kept of it, and the coefficients."""

    model: Any
    optimizer: Optimizer
    prescribed: dict[str, float]

    def coefficients(self, step: int) -> dict[str, float]: ...


@dataclass(kw_only=True)
class Course:
    """Treatments given together, and judged together."""

    step: int
    held_out_before: float
    held_out_after: float
    treatments: list[Treatment]


@dataclass(kw_only=True)
class Doctor:
    """Watches a training run, and treats it in mode "act"; "advise" only says what it would do.

    trained: the stepper. held_out: the held-out loss now, the same on all ranks. questions: token ids BS (and where
    documents matter, theirs) that experts are asked about, the same on all ranks. say: told each line of the log.
    Every rank has its own doctor, which sees the same loads and does the same.
    """

    trained: Trained
    mode: Literal["advise", "act"]
    held_out: Callable[[], float]
    questions: tuple[Tensor, Tensor | None]
    settings: DoctorSettings = field(default_factory=DoctorSettings)
    seed: int = 0
    say: Callable[[Line], object] | None = None

    def __post_init__(self) -> None:
        self._window: deque[StepLoad] = deque(maxlen=self.settings.every)
        self._seen: dict[Key, int] = {}
        self._tried: dict[Key, int] = {}
        self._advised: set[tuple[Key, str]] = set()
        self._course: Course | None = None

    def after_step(self, step: int, load: StepLoad) -> list[Line]:
        """Look at a step that is done, counted from 1. Returns what there is to log, which `say` has been told, too."""
        if self._window and len(self._window[-1].layers) != len(load.layers):
            self._window.clear()  # layers that predict further tokens have joined, or left
        if load.layers:
            self._window.append(load)
        lines: list[Line] = []
        with undisturbed():
            if self._course is not None and step >= self._course.step + self.settings.course:
                lines += self._judge(step, self._course)
            is_free = self._course is None and step > self.settings.rest
            if is_free and len(self._window) == self.settings.every and step % self.settings.every == 0:
                lines += self._look(step)
        for line in lines:
            if self.say is not None:
                self.say(line)
        return lines

    def _look(self, step: int) -> list[Line]:
        patient = self._patient(step)
        duplicates = {layer: probed.duplicates() for layer, probed in patient.probes.items()}
        found = findings_in(tuple(self._window), duplicates, mute_experts(patient))
        self._seen = {finding.key: self._seen.get(finding.key, 0) + 1 for finding in found}
        lasting = [finding for finding in found if self._seen[finding.key] >= self.settings.patience]
        chosen = _first_things_first(lasting)
        if self.mode == "advise":
            return list(self._advice(step, chosen))
        return self._treat(step, patient, chosen)

    def _advice(self, step: int, findings: Iterable[Finding]) -> Iterable[Line]:
        """Each thing once."""
        for finding in findings:
            remedy = LADDERS[finding.kind][-1]
            if (finding.key, remedy) in self._advised:
                continue
            self._advised.add((finding.key, remedy))
            yield _line(step, "advised", finding, sentence=f"{finding.sentence}. Remedy: {WHAT[remedy]}")

    def _treat(self, step: int, patient: Patient, findings: Iterable[Finding]) -> list[Line]:
        findings = [finding for finding in findings if self._is_treatable(finding, patient)]
        last = self.settings.last
        if not findings or (last is not None and step + self.settings.course > last):
            return []
        before = self.held_out()
        treatments = [found for finding in findings if (found := self._next(patient, finding)) is not None]
        if not treatments:
            return []
        after = self.held_out()
        course = Course(step=step, held_out_before=before, held_out_after=after, treatments=treatments)
        lines = [
            _line(
                step,
                "treated",
                treatment.finding,
                remedy=treatment.remedy,
                sentence=f"{treatment.finding.sentence}. Done: {treatment.sentence}",
                held_out=[before, after],
                **treatment.facts,
            )
            for treatment in treatments
        ]
        if not after <= before * (1 + self.settings.at_once):
            return lines + self._undo(step, patient, course, after, WORSE)
        self._course = course
        return lines

    def _is_treatable(self, finding: Finding, patient: Patient) -> bool:
        """Whether a remedy is left, and the layer was asked (those that predict further tokens are not)."""
        is_left = self._tried.get(finding.key, 0) < len(LADDERS[finding.kind])
        return is_left and finding.kind not in ONLY_TOLD and finding.layer in patient.probes

    def _next(self, patient: Patient, finding: Finding) -> Treatment | None:
        """The next remedy on the ladder that applies."""
        ladder = LADDERS[finding.kind]
        for rung in range(self._tried.get(finding.key, 0), len(ladder)):
            treatment = REMEDIES[ladder[rung]](patient, finding)
            if treatment is not None:
                self._tried[finding.key] = rung + 1
                return treatment
        return None  # what does not apply now may apply at the next look

    def _judge(self, step: int, course: Course) -> list[Line]:
        patient, after = self._patient(step), self.held_out()
        self._course = None
        if not after <= course.held_out_before * (1 + self.settings.worse):
            return self._undo(step, patient, course, after, WORSE)
        for treatment in course.treatments:
            treatment.end(patient)
        return [
            _line(
                step,
                "kept",
                treatment.finding,
                remedy=treatment.remedy,
                sentence=f"{treatment.remedy} of step {course.step} is kept: the held-out loss is no worse",
                held_out=[course.held_out_before, after],
            )
            for treatment in course.treatments
        ]

    def leave(self, step: int) -> list[Line]:
        """Undo what is on trial, since nobody will judge it: `step` comes next, and the doctor is called no more.

        Treatments that were judged stay. What is left in `state` is what another doctor must know of this one.
        """
        self._window.clear()
        self._seen = {}
        if self._course is None:
            return []
        course, self._course = self._course, None
        with undisturbed():
            return self._undo(step, self._patient(step), course, self.held_out(), "no doctor is left to judge it")

    def _undo(self, step: int, patient: Patient, course: Course, after: float, why: str) -> list[Line]:
        for treatment in reversed(course.treatments):
            treatment.undo(patient)
        return [
            _line(
                step,
                "undone",
                treatment.finding,
                remedy=treatment.remedy,
                sentence=f"{treatment.remedy} of step {course.step} is undone: {why}",
                held_out=[course.held_out_before, after],
            )
            for treatment in course.treatments
        ]

    def _patient(self, step: int) -> Patient:
        trained, (token_ids_BS, document_ids_BS) = self.trained, self.questions
        together = sum_loads(self._window) if self._window else StepLoad(step=step, layers=())
        probes: dict[int, LayerProbe] = probe(trained.model, token_ids_BS, document_ids_BS=document_ids_BS)
        coefficients = trained.coefficients(step)
        plain = {name: value - trained.prescribed.get(name, 0.0) for name, value in coefficients.items()}
        return Patient(
            model=trained.model,
            optimizer=trained.optimizer,
            extra=trained.prescribed,
            coefficients=plain,
            load={layer.layer: layer for layer in together.layers},
            probes=probes,
            seed=self.seed + step,
        )

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(JSON, tensors): everything that `restore` needs for the next steps to be the same."""
        tensors: dict[str, Tensor] = {}
        course = None if self._course is None else _course_to_json(self._course, tensors)
        json = {
            "window": [load.to_json() for load in self._window],
            "seen": [[*key, count] for key, count in self._seen.items()],
            "tried": [[*key, count] for key, count in self._tried.items()],
            "advised": [[*key, remedy] for key, remedy in sorted(self._advised)],
            "prescribed": dict(self.trained.prescribed),
            "capacities": self._capacities(),
            "course": course,
        }
        return json, tensors

    def restore(self, json: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self._window.extend(StepLoad.from_json(tree) for tree in json["window"])
        self._seen = {Key(kind, layer, expert): count for kind, layer, expert, count in json["seen"]}
        self._tried = {Key(kind, layer, expert): count for kind, layer, expert, count in json["tried"]}
        self._advised = {(Key(kind, layer, expert), remedy) for kind, layer, expert, remedy in json["advised"]}
        self.trained.prescribed.clear()
        self.trained.prescribed.update(json["prescribed"])
        for layer, module in _limited(self.trained.model):
            factor = json["capacities"].get(str(layer))
            if factor is not None:
                module.capacity = replace(module.capacity, factor=factor)
        self._course = None if json["course"] is None else _course_of(json["course"], tensors)

    def _capacities(self) -> dict[str, float]:
        return {str(layer): module.capacity.factor for layer, module in _limited(self.trained.model)}


def _limited(model: torch.nn.Module) -> Iterable[tuple[int, Any]]:
    from moesaic.telemetry.probe import routed_layers

    for layer, module in routed_layers(model).items():
        if module.capacity is not None and module.capacity.factor is not None:
            yield layer, module


def _first_things_first(findings: list[Finding]) -> list[Finding]:
    """What follows from another finding waits until that has been treated: where one takes all, others starve, and
    the rows of either have the logits that look unstable."""
    layers = {kind: {finding.layer for finding in findings if finding.kind == kind} for kind in ("oversized", "dead")}
    waits = {
        "dead": layers["oversized"],
        "cold": layers["oversized"],
        "unstable": layers["oversized"] | layers["dead"],
    }
    return [finding for finding in findings if finding.layer not in waits.get(finding.kind, ())]


def _line(step: int, what: str, finding: Finding, **more: Any) -> Line:
    place = {"layer": finding.layer, "expert": finding.expert, "other": finding.other}
    where = {name: value for name, value in place.items() if value >= 0}
    return {"step": step, "doctor": what, "finding": finding.kind, **where, **more}


def _course_to_json(course: Course, tensors: dict[str, Tensor]) -> dict[str, Any]:
    treatments = []
    for number, treatment in enumerate(course.treatments):
        for place, kept in enumerate(treatment.kept):
            tensors[f"{number}.{place}"] = kept.values
        treatments.append(
            {
                "remedy": treatment.remedy,
                "finding": asdict(treatment.finding),
                "sentence": treatment.sentence,
                "facts": treatment.facts,
                "kept": [[kept.name, kept.rows] for kept in treatment.kept],
                "extra": treatment.extra,
                "factors": [[layer, factor] for layer, factor in treatment.factors.items()],
            }
        )
    before, after = course.held_out_before, course.held_out_after
    return {"step": course.step, "held_out_before": before, "held_out_after": after, "treatments": treatments}


def _course_of(tree: dict[str, Any], tensors: dict[str, Tensor]) -> Course:
    treatments = [
        Treatment(
            remedy=each["remedy"],
            finding=Finding(**each["finding"]),
            sentence=each["sentence"],
            facts=each["facts"],
            kept=[
                Kept(name, rows, tensors[f"{number}.{place}"].clone())
                for place, (name, rows) in enumerate(each["kept"])
            ],
            extra=each["extra"],
            factors={layer: factor for layer, factor in each["factors"]},
        )
        for number, each in enumerate(tree["treatments"])
    ]
    return Course(
        step=tree["step"],
        held_out_before=tree["held_out_before"],
        held_out_after=tree["held_out_after"],
        treatments=treatments,
    )


def check_treatable(model: Any) -> Decoder:
    """The model, if the doctor can look at it. Raises ConfigError for encoder-decoders and models without experts."""
    from moesaic.errors import ConfigError
    from moesaic.models.build import decoder_only
    from moesaic.telemetry.probe import routed_layers

    decoder = decoder_only(model, "the doctor")
    if not routed_layers(decoder):
        raise ConfigError(
            f"{decoder.config.family} without experts: the doctor looks at routers and experts, and this model is "
            "dense; leave train.doctor at 'off'"
        )
    return decoder
