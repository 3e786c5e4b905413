"""What is done about a finding. Each remedy says itself in a sentence, and leaves behind what undoes it.

T tokens, D hidden, E experts.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.models.build import Model
from moesaic.registry import Registry
from moesaic.routing.balancers import BALANCE_LOSSES, refuse_unfit
from moesaic.telemetry.load import LayerLoad
from moesaic.telemetry.probe import LayerProbe
from moesaic.train.doctor.findings import Finding
from moesaic.train.doctor.split import raised_row, split_rows
from moesaic.train.doctor.surgery import ROUTER_PARTS, RUNNING, Kept, Theatre, put_back
from moesaic.train.loss import routers_of
from moesaic.train.optimizer import Optimizer

EVENING = 10.0  # times the recipe's coefficient, while a schedule lasts
EVENING_ALONE = 0.01  # the coefficient where the recipe evens nothing out (Switch, arXiv:2101.03961)
Z_LOSS = 0.001  # ST-MoE, arXiv:2202.08906
WIDER = 1.25  # times the capacity
OUT_OF_ALL = 4.0  # times the median length of router rows, beyond which one row alone is what is unstable


@dataclass(kw_only=True)
class Patient:
    """What remedies may touch: the model, its optimizer, and what is added to coefficients while they last.

    load: of the window, by layer. probes: what each layer's router saw of the doctor's own text. seed: of noise.
    taken: (layer, expert) pairs whose rows have changed already in this round.
    """

    model: Model
    optimizer: Optimizer
    extra: dict[str, float]
    coefficients: dict[str, float]
    load: dict[int, LayerLoad]
    probes: dict[int, LayerProbe]
    seed: int = 0
    taken: set[tuple[int, int]] = field(default_factory=set)


@dataclass(kw_only=True)
class Treatment:
    """A remedy that was given. `facts`: before and after, in numbers. kept, extra, factors: what undoes it."""

    remedy: str
    finding: Finding
    sentence: str
    facts: dict[str, Any] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)
    factors: dict[int, float] = field(default_factory=dict)

    def undo(self, patient: Patient) -> None:
        """Put back what it changed."""
        put_back(patient.model, patient.optimizer, self.kept)
        self.end(patient)
        for layer, factor in self.factors.items():
            set_capacity(patient, layer, factor)

    def end(self, patient: Patient) -> None:
        """Stop what lasts only a while."""
        for name, value in self.extra.items():
            left = patient.extra.get(name, 0.0) - value
            patient.extra[name] = left
            if abs(left) < 1e-12:
                del patient.extra[name]


Remedy = Callable[[Patient, Finding], Treatment | None]
REMEDIES: Registry[Remedy] = Registry("remedy")
"""Each gives a treatment, or None where it does not apply. Their layers have been probed."""

LADDERS: dict[str, tuple[str, ...]] = {
    "oversized": ("coefficients", "bias_nudge", "reset_router_row"),
    "dead": ("bias_nudge", "reseed"),
    "duplicate": ("merge",),
    "cold": ("bias_nudge", "coefficients"),
    "unstable": ("reset_router_row", "z_loss"),
    "dropping": ("capacity",),
}
"""The remedies of each finding, the gentlest first; those that do not apply are skipped."""

ONLY_TOLD = frozenset({"cold"})
"""Findings that healthy runs have, too: they are told, and never treated."""

WHAT: dict[str, str] = {
    "coefficients": "weigh the loss that evens the load ten times as much for a while",
    "bias_nudge": "shift the expert's selection bias until it gets its fair share; its weights stay",
    "reset_router_row": "give the expert an ordinary router row, the median of the others' and noise; its weights stay",
    "reseed": "give it the weights of the busiest expert and half of its tokens, both with the probability they had",
    "merge": "let one of the two serve both's tokens, and re-seed the other from the busiest expert",
    "z_loss": "penalise large router logits for a while (z-loss)",
    "capacity": "give every expert a quarter more slots",
}
"""Each remedy in a sentence: what advice says."""


@REMEDIES.register("coefficients")
def coefficients(patient: Patient, finding: Finding) -> Treatment | None:
    """Times ten, for a course. Where a saturated score has no gradient left it cannot help, and is not tried."""
    load = patient.load[finding.layer]
    if finding.kind == "oversized" and load.mean_scores_E is not None and _is_saturated(load, finding.expert):
        return None
    evening = {name: value for name, value in patient.coefficients.items() if BALANCE_LOSSES[name].evens and value}
    extra = {name: (EVENING - 1) * value for name, value in evening.items()} or {"switch": EVENING_ALONE}
    return _with_extra(patient, finding, "coefficients", extra)


@REMEDIES.register("z_loss")
def z_loss(patient: Patient, finding: Finding) -> Treatment | None:
    """0.001 more of it, for a course."""
    return _with_extra(patient, finding, "z_loss", {"router_z": Z_LOSS})


def _with_extra(patient: Patient, finding: Finding, remedy: str, extra: dict[str, float]) -> Treatment | None:
    if any(name in patient.extra for name in extra):
        return None  # it is being given already
    try:
        refuse_unfit(extra, list(routers_of(patient.model.config).values()))
    except ConfigError:
        return None  # no router of this model has that loss
    patient.extra.update(extra)
    facts = {
        name: [patient.coefficients.get(name, 0.0), patient.coefficients.get(name, 0.0) + value]
        for name, value in extra.items()
    }
    return Treatment(remedy=remedy, finding=finding, sentence=WHAT[remedy], facts={"coefficients": facts}, extra=extra)


@REMEDIES.register("bias_nudge")
def bias_nudge(patient: Patient, finding: Finding) -> Treatment | None:
    """The shift at which the expert gets its fair share of the doctor's own text, found by bisection."""
    theatre, probe = Theatre(patient.model, patient.optimizer, finding.layer), patient.probes[finding.layer]
    bias_E = theatre.router_buffer("selection_bias")
    rechoose = probe.decision.rechoose
    if bias_E is None or rechoose is None or not _is_alive(theatre, finding.expert):
        return None
    logits_TE, before = _logits(probe), float(bias_E[finding.expert])
    fair = len(logits_TE) * probe.module.router.config.top_k / len(bias_E)

    def rows(value: float) -> int:
        bias_E[finding.expert] = value
        return int((rechoose(logits_TE) == finding.expert).sum())

    low, high = before - 10.0, before + 10.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if rows(middle) < fair else (low, middle)
    bias_E[finding.expert] = before
    theatre.write_buffer("selection_bias", finding.expert, high)
    facts = {"selection_bias": [before, high]}
    return Treatment(remedy="bias_nudge", finding=finding, sentence=WHAT["bias_nudge"], facts=facts, kept=theatre.kept)


@REMEDIES.register("reset_router_row")
def reset_router_row(patient: Patient, finding: Finding) -> Treatment | None:
    """w_e = the median of the other rows, and noise as wide as they are about it. Selection biases become their mean.
    Of an unstable router: the row that is far longer than all others, if there is one."""
    theatre = Theatre(patient.model, patient.optimizer, finding.layer)
    weight, expert = theatre.router_weight("weight"), finding.expert
    if weight is None or not _can_choose_again(patient, finding):
        return None
    if finding.kind == "unstable" and (expert := _far_longer(weight.master)) is None:
        return None
    if (finding.layer, expert) in patient.taken:
        return None
    before, others = (
        float(weight.master[expert].norm()),
        [e for e in range(_num_experts(patient, finding)) if e != expert],
    )
    rows_ED = weight.master[others]
    noise_D = torch.from_numpy(_generator(patient, finding.layer, expert).standard_normal(rows_ED.shape[1])).to(rows_ED)
    middle_D = rows_ED.quantile(0.5, dim=0)
    width_D = (rows_ED - middle_D).abs().quantile(0.5, dim=0) / 0.6745  # other ill rows have no part in either
    theatre.write(weight, expert, middle_D + width_D * noise_D)
    for part in ROUTER_PARTS[1:]:
        if (other := theatre.router_weight(part)) is not None:
            theatre.write(other, expert, other.master[others].mean(0))
    if (biases_E := theatre.router_buffer("selection_bias")) is not None:
        theatre.write_buffer("selection_bias", expert, biases_E[others].mean())
    _restate(theatre, patient.probes[finding.layer], (expert,))
    patient.taken.add((finding.layer, expert))
    facts = {"begins_anew": expert, "row_norm": [before, float(weight.master[expert].norm())]}
    return Treatment(
        remedy="reset_router_row", finding=finding, sentence=WHAT["reset_router_row"], facts=facts, kept=theatre.kept
    )


@REMEDIES.register("reseed")
def reseed(patient: Patient, finding: Finding) -> Treatment | None:
    """Weights of the busiest expert, and half of its tokens (see split.py)."""
    theatre = Theatre(patient.model, patient.optimizer, finding.layer)
    facts = _seed_from_busiest(patient, theatre, finding, finding.expert)
    if facts is None:
        return None
    return Treatment(remedy="reseed", finding=finding, sentence=WHAT["reseed"], facts=facts, kept=theatre.kept)


@REMEDIES.register("merge")
def merge(patient: Patient, finding: Finding) -> Treatment | None:
    """The first keeps the probability mass of both; the second begins again as half of the busiest expert."""
    theatre, probe = Theatre(patient.model, patient.optimizer, finding.layer), patient.probes[finding.layer]
    counts_E = patient.load[finding.layer].counts_E
    pair = (finding.expert, finding.other)
    stays, goes = pair if counts_E[pair[0]] >= counts_E[pair[1]] else pair[::-1]
    weight, busy = theatre.router_weight("weight"), _busiest(patient, finding.layer, {goes})
    if weight is None or busy is None or not _can_choose_again(patient, finding):
        return None
    if any((finding.layer, expert) in patient.taken for expert in pair):
        return None
    row_D, constant = raised_row(probe.module.router, probe.x_TD, stays, goes)
    theatre.write(weight, stays, row_D, state_of=stays)
    if (bias := theatre.router_weight("bias")) is not None:
        theatre.write(bias, stays, torch.tensor(constant), state_of=stays)
    facts = _seed_from_busiest(patient, theatre, finding, goes, given_away=True)
    if facts is None:
        put_back(patient.model, patient.optimizer, theatre.kept)
        return None
    patient.taken.add((finding.layer, stays))
    return Treatment(
        remedy="merge", finding=finding, sentence=WHAT["merge"], facts={"stays": stays, **facts}, kept=theatre.kept
    )


@REMEDIES.register("capacity")
def capacity(patient: Patient, finding: Finding) -> Treatment | None:
    """Times 1.25, where the capacity is a factor."""
    limits = patient.probes[finding.layer].module.capacity
    if limits is None or limits.factor is None:
        return None
    before = limits.factor
    set_capacity(patient, finding.layer, before * WIDER)
    facts = {"capacity_factor": [before, before * WIDER]}
    return Treatment(
        remedy="capacity", finding=finding, sentence=WHAT["capacity"], facts=facts, factors={finding.layer: before}
    )


def set_capacity(patient: Patient, layer: int, factor: float) -> None:
    """A layer's capacity factor, while training, from now on."""
    module = patient.probes[layer].module
    assert module.capacity is not None
    module.capacity = dataclasses.replace(module.capacity, factor=factor)


def _seed_from_busiest(
    patient: Patient, theatre: Theatre, finding: Finding, expert: int, *, given_away: bool = False
) -> dict[str, Any] | None:
    """Make `expert` the twin of the busiest that has not been cut yet; None where there is nobody to share with."""
    probe, weight = patient.probes[finding.layer], theatre.router_weight("weight")
    busy = _busiest(patient, finding.layer, {expert})
    if weight is None or busy is None or (finding.layer, expert) in patient.taken:
        return None
    if not _can_choose_again(patient, finding):
        return None
    rows = split_rows(probe.module.router, probe.x_TD, busy, expert, given_away=given_away)
    for part in theatre.expert_weights:
        theatre.write(part, expert, part.master[busy], state_of=busy)
    for row, values_D in ((busy, rows.first_D), (expert, rows.second_D)):
        theatre.write(weight, row, values_D, state_of=busy)
        if (bias := theatre.router_weight("bias")) is not None:
            theatre.write(bias, row, torch.tensor(rows.constant), state_of=busy)
    if (noise := theatre.router_weight("noise_weight")) is not None:
        theatre.write(noise, expert, noise.master[busy], state_of=busy)
    if (biases_E := theatre.router_buffer("selection_bias")) is not None:
        theatre.write_buffer("selection_bias", expert, biases_E[busy].clone())
    _restate(theatre, probe, (busy, expert))
    patient.taken |= {(finding.layer, busy), (finding.layer, expert)}
    mass = [rows.mass_before, rows.mass_after]
    return {"begins_anew": expert, "from": busy, "probability_mass_of_both": mass}


def _restate(theatre: Theatre, probe: LayerProbe, experts: Sequence[int]) -> None:
    """Make a router's running means and variances, where it has them, those of its new rows' logits."""
    weight, bias = theatre.router_weight("weight"), theatre.router_weight("bias")
    if weight is None or theatre.router_buffer(RUNNING[0]) is None:
        return
    for expert in experts:
        logits_T = probe.x_TD.float() @ weight.master[expert].float()
        if bias is not None:
            logits_T = logits_T + bias.master[expert].float()
        var, mean = torch.var_mean(logits_T, correction=0)
        for part, value in zip(RUNNING, (mean, var), strict=True):
            theatre.write_buffer(part, expert, value)


def _busiest(patient: Patient, layer: int, without: set[int]) -> int | None:
    """The expert with the most rows that has weights, and whose own row has not changed in this round."""
    counts_E, theatre = patient.load[layer].counts_E, Theatre(patient.model, patient.optimizer, layer)
    taken = without | {e for at, e in patient.taken if at == layer}
    free = [e for e in range(len(counts_E)) if e not in taken and counts_E[e] and _is_alive(theatre, e)]
    return max(free, key=lambda e: (counts_E[e], -e)) if free else None


def _can_choose_again(patient: Patient, finding: Finding) -> bool:
    """Whether the router's rows decide who is chosen: a table or an assignment does not listen to them."""
    return patient.probes[finding.layer].decision.rechoose is not None


def _num_experts(patient: Patient, finding: Finding) -> int:
    return patient.load[finding.layer].num_experts


def _is_saturated(load: LayerLoad, expert: int) -> bool:
    """Whether an expert's mean score leaves the softmax no gradient to come down by."""
    return load.mean_scores_E is not None and float(load.mean_scores_E[expert]) > 0.8


def _is_alive(theatre: Theatre, expert: int) -> bool:
    """Whether an expert's weights do anything: one of zeros has no gradient however many tokens it is sent."""
    return all(bool(part.master[expert].any()) for part in theatre.expert_weights if part.master.dim() > 2)


def _far_longer(rows_ED: Tensor) -> int | None:
    lengths_E = rows_ED.norm(dim=-1)
    longest = int(lengths_E.argmax())
    return longest if lengths_E[longest] > OUT_OF_ALL * lengths_E.median() else None


def mute_experts(patient: Patient) -> dict[int, list[int]]:
    """By layer: experts whose weights are all 0."""
    mute = {}
    for layer in patient.probes:
        theatre = Theatre(patient.model, patient.optimizer, layer)
        num_experts = len(theatre.expert_weights[0].master)
        mute[layer] = [expert for expert in range(num_experts) if not _is_alive(theatre, expert)]
    return mute


def _logits(probe: LayerProbe) -> Tensor:
    logits_TE, mask_T = probe.decision.logits_TE, probe.decision.mask_T
    return logits_TE if mask_T is None else logits_TE[mask_T]


def _generator(patient: Patient, layer: int, expert: int) -> np.random.Generator:
    """Noise that depends on the run, the layer and the expert alone: the same on every rank and after a stop."""
    return np.random.default_rng([patient.seed, layer, expert])
