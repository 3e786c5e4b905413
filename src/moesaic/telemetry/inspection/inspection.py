"""All that `moesaic inspect` tells, as one document: one or two models, and how far they agree."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from moesaic.errors import TraceError
from moesaic.telemetry.drift import Saturation, saturation
from moesaic.telemetry.inspection.choices import Choices
from moesaic.telemetry.inspection.findings import Findings, inspect_trace
from moesaic.telemetry.inspection.samples import Sample, Way, samples, to_json, ways
from moesaic.telemetry.inspection.tokens import TokenTexts
from moesaic.trace import Trace


class Agreement(NamedTuple):
    """How many of one model's choices others make as well, by layer, and how many they would by chance: with the loads
    that they have, independently. names: of the others, a run's checkpoints for instance; one entry for each."""

    names: list[str]
    layers: dict[int, list[float | None]]
    chance: dict[int, list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model: findings, text to colour, the ways of frequent tokens, and the texts of the tokens that are named."""

    name: str
    source: str
    findings: Findings
    samples: list[Sample]
    ways: list[Way]
    token_texts: dict[int, str]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            "name": self.name,
            "source": self.source,
            **self.findings.to_json(),
            "samples": to_json(self.samples),
            "ways": to_json(self.ways),
            "token_texts": self.token_texts,
        }


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """One model, or two side by side. agreement: None where they cannot be compared, and why_not says why."""

    subjects: Sequence[Subject]
    agreement: Agreement | None = None
    why_not: str = ""
    saturation: Agreement | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            "subjects": [subject.to_json() for subject in self.subjects],
            "agreement": None if self.agreement is None else self.agreement._asdict(),
            "why_not": self.why_not,
            "saturation": None if self.saturation is None else self.saturation._asdict(),
        }


def subject_of(
    name: str,
    source: str,
    trace: Trace,
    texts: TokenTexts | None,
    *,
    told: Callable[[int], object] = lambda layer: None,
) -> Subject:
    """Everything about one trace. texts: of its tokens, None where no tokenizer is known."""
    findings = inspect_trace(trace, texts, told=told)
    loved = {token.token_id for layer in findings.layers for tokens in layer.loved or () for token in tokens}
    return Subject(
        name=name,
        source=source,
        findings=findings,
        samples=samples(trace, texts) if texts else [],
        ways=ways(trace, texts) if texts else [],
        token_texts={token_id: texts.shown(token_id) if texts else f"<{token_id}>" for token_id in sorted(loved)},
    )


def why_not_comparable(left: Trace, right: Trace) -> str | None:
    """Why two traces' choices cannot be held against each other, in words; None where they can."""
    mine, its = left.fingerprint, right.fingerprint
    if mine.num_experts != its.num_experts:
        return "they have other layers, or other numbers of experts"
    if len(left) != len(right) or left.num_tokens != right.num_tokens:
        return "they read other texts"
    ids = [trace.token_facts.get("token_ids") for trace in (left, right)]
    if ids[0] is None or ids[1] is None:
        return "the tokens of one of them are not known"
    return None if (ids[0] == ids[1]).all() else "they read other tokens"


def agree(names: Sequence[str], earlier: Sequence[Trace], last: Trace) -> Agreement:
    """How many of the last trace's choices each of the others makes.

    Raises TraceError for traces that cannot be compared.
    """
    for trace in earlier:
        if reason := why_not_comparable(trace, last):
            raise TraceError(
                f"{trace.path} and {last.path} cannot be compared: {reason}; record both with the same text"
            )
    final, others = Choices(last), [Choices(trace) for trace in earlier]
    found: dict[int, list[Saturation]] = {}
    for layer, num_experts in last.fingerprint.num_experts.items():
        at_last = final.matrix(layer)
        found[layer] = [saturation(other.matrix(layer), at_last, num_experts) for other in others]
    return Agreement(
        names=list(names),
        layers={layer: [_known(each.share) for each in saturations] for layer, saturations in found.items()},
        chance={layer: [_known(each.chance) for each in saturations] for layer, saturations in found.items()},
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
