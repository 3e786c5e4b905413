"""Looks at a finished model on some text: the health of every layer, what is ill, and what training could do about it.

Nothing is changed: the doctor acts only while a model is trained.

T tokens, M columns of choices.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingDecision
from moesaic.telemetry.health import RouterHealth
from moesaic.telemetry.likeness import Duplicate
from moesaic.telemetry.load import LayerLoad, StepLoad, sum_loads
from moesaic.telemetry.probe import probe
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.telemetry.states import ExpertState, clumping, states_of
from moesaic.train.doctor.findings import Finding, findings_in
from moesaic.train.doctor.remedies import LADDERS, ONLY_TOLD, WHAT


class Question(NamedTuple):
    """Text to look at, B x S; mask_BS is false for padding, None without any. domain: -1 is none."""

    token_ids_BS: Tensor
    mask_BS: Tensor | None = None
    domain: int = -1


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer: its load over all the text, its experts one by one, and those that answer the same.

    clumping: how many tokens of this text said as much as one drawn alone (see `telemetry.states`).
    """

    load: LayerLoad
    states: tuple[ExpertState, ...]
    duplicates: tuple[Duplicate, ...]
    clumping: float

    def number(self, state: str) -> int:
        """How many experts are in a state."""
        return sum(expert.state == state for expert in self.states)


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Everything that was found. choices: by layer, which experts every token chose, [T, M], -1 where it has no such
    choice. text_digest: of the tokens that were read."""

    layers: tuple[LayerReport, ...]
    findings: tuple[Finding, ...]
    num_tokens: int
    choices: Mapping[int, NDArray[np.int16]]
    text_digest: str

    @property
    def health(self) -> RouterHealth:
        """The layers' loads in numbers."""
        return RouterHealth.of(StepLoad(step=0, layers=tuple(layer.load for layer in self.layers)))

    def advice(self) -> Iterator[tuple[Finding, str | None]]:
        """Each finding, and what training with `--doctor act` could do, the gentlest first; None where it does not."""
        for finding in self.findings:
            remedies = "; or ".join(WHAT[remedy] for remedy in LADDERS[finding.kind])
            yield finding, None if finding.kind in ONLY_TOLD else remedies

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            "tokens": self.num_tokens,
            "verdict": self.health.verdict,
            "layers": [
                {
                    **layer.load.to_json(),
                    "clumping": layer.clumping,
                    "states": [expert.state for expert in layer.states],
                    "duplicates": [[pair.first, pair.second, pair.similarity] for pair in layer.duplicates],
                }
                for layer in self.layers
            ],
            "findings": [
                {
                    "kind": finding.kind,
                    "layer": finding.layer,
                    "expert": finding.expert if finding.expert >= 0 else None,
                    "other": finding.other if finding.other >= 0 else None,
                    "sentence": finding.sentence,
                    "remedies": list(LADDERS[finding.kind]) if advice else [],
                    "advice": advice,
                }
                for finding, advice in self.advice()
            ],
        }


def examine(model: Decoder, questions: Iterable[Question], *, num_domains: int = 0) -> Examination:
    """Run a model over text, as in evaluation, and judge what its routers did.

    Each question is a window of its own for the account of chance. Experts are compared on the first one.
    """
    recorder = _Listener.for_model(model.config, num_domains=num_domains)
    digest = hashlib.sha256()
    window: list[StepLoad] = []
    duplicates: dict[int, tuple[Duplicate, ...]] = {}
    model.eval()
    for question in questions:
        if not duplicates:
            probed = probe(model, question.token_ids_BS, question.mask_BS)
            duplicates = {layer: each.duplicates() for layer, each in probed.items()}
        recorder.set_domains(question.domain if num_domains and question.domain >= 0 else None)
        with torch.no_grad():
            model.hidden(question.token_ids_BS, question.mask_BS, tape=recorder)
        window.append(recorder.finish_step())
        digest.update(question.token_ids_BS.numpy().tobytes())
    return Examination(
        layers=tuple(_layer_reports(window, duplicates)),
        findings=findings_in(window, duplicates),
        num_tokens=sum(load.layers[0].num_tokens for load in window if load.layers),
        choices={layer: _stacked(parts) for layer, parts in recorder.choices_of.items()},
        text_digest=digest.hexdigest(),
    )


class _Listener(LoadRecorder):
    """Keeps the choices, too."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.choices_of: dict[int, list[NDArray[np.int16]]] = {}

    def hear(self, layer: int, decision: RoutingDecision) -> None:
        super().hear(layer, decision)
        self.choices_of.setdefault(layer, []).append(decision.chosen.choices().numpy().astype(np.int16))


def _stacked(parts: list[NDArray[np.int16]]) -> NDArray[np.int16]:
    """One below the other; those with fewer columns are filled with -1."""
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1) for part in parts])


def _layer_reports(window: list[StepLoad], duplicates: dict[int, tuple[Duplicate, ...]]) -> Iterator[LayerReport]:
    for index, load in enumerate(sum_loads(window).layers):
        parts = [step.layers[index] for step in window]
        clumped = clumping([part.counts_E for part in parts], [part.num_tokens for part in parts])
        yield LayerReport(
            load=load,
            states=states_of(load, clumping=clumped),
            duplicates=duplicates.get(load.layer, ()),
            clumping=clumped,
        )
