"""What a trace says of a model's experts, as plain data that goes to JSON: `inspect_trace`.

N tokens, E experts, M domains, C token classes, X frequent tokens.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from moesaic.errors import DataError
from moesaic.telemetry.health import (
    coefficient_of_variation,
    domain_divergence,
    effective_experts,
    load_entropy,
    max_violation,
)
from moesaic.telemetry.inspection.choices import Choices, Counts, cross
from moesaic.telemetry.inspection.measures import divergence_from_average, information, specialisation
from moesaic.telemetry.inspection.token_classes import CLASSES, classes_of
from moesaic.telemetry.inspection.tokens import Frequent, Loved, TokenTexts, frequent, loved
from moesaic.telemetry.likeness import CoActivation, co_activation
from moesaic.telemetry.states import clumping, expert_states
from moesaic.trace import LayerFingerprint, Trace

SHUFFLES = 3  # whose mean is the baseline
MOST_CELLS = 600_000  # of all layers' co-activation tables; beyond, only the pairs are told


class Against(NamedTuple):
    """A measure, and what it is of shuffled labels: the mean of `SHUFFLES`. None: too little to measure."""

    value: float | None
    shuffled: float | None


class Companions(NamedTuple):
    """Two experts that serve the same tokens: the share of the first one's that the second serves, too; and `lift`,
    how many times as many that are as independent choices would give."""

    first: int
    second: int
    share: float
    lift: float


@dataclass(frozen=True, kw_only=True)
class LayerFindings:
    """One layer. Tables are lists of rows; None where the trace does not know what they need.

    counts [E]; domain_counts [M][E]; class_counts [C][E]: rows. mean_weights [E]: of an expert's rows.
    divergence: of domains from their average, in bits (`divergence_from_average`); domain_divergence: among them, of 1.
    information: bits that a label tells of the expert, by kind of label: domain, class, token, next token.
    vocabulary: (of the token that goes in, of the one that comes next) OLMoE's specialisation, chance K/E.
    states [E]: "dead", "cold", "fair", "oversized" or "unknown" (see `telemetry.states`; its windows: pieces of text).
    loved [E]: an expert's tokens. pairs: the closest; company [E][E]: lifts (see `telemetry.likeness.CoActivation`).
    """

    layer: int
    router: str
    num_experts: int
    top_k: int
    rows_per_token: float
    counts: list[int]
    mean_weights: list[float | None]
    max_violation: float | None
    load_entropy: float | None
    effective_experts: float | None
    variation: float | None
    states: list[str]
    domain_counts: list[list[int]] | None
    class_counts: list[list[int]] | None
    divergence: Against | None
    domain_divergence: float | None
    information: dict[str, Against]
    vocabulary: dict[str, Against]
    loved: list[list[Loved]] | None
    pairs: list[Companions]
    company: list[list[float | None]] | None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything a trace says. num_texts: pieces of text, the units whose domains are shuffled.

    domain_tokens [M]: tokens of each domain. classes: names, where tokens' texts are known.
    """

    family: str
    num_tokens: int
    num_texts: int
    domains: list[str]
    domain_tokens: list[int]
    classes: list[str]
    layers: list[LayerFindings]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; numbers that are none are null."""
        return {**asdict(self), "layers": [_named(layer) for layer in self.layers]}


class _Labels(NamedTuple):
    """One kind of label: its number at each token (-1: none), and a way to shuffle it."""

    labels_N: np.ndarray
    num_labels: int
    shuffled: Callable[[np.random.Generator], np.ndarray]


def inspect_trace(
    trace: Trace, texts: TokenTexts | None = None, *, seed: int = 0, told: Callable[[int], object] = lambda layer: None
) -> Findings:
    """Measure all layers of a trace. texts: of its tokens; without them there are no classes. told: hears each layer.

    Raises TraceError for a trace without tokens, DataError where the tokens cannot be of this tokenizer.
    """
    choices = Choices(trace)
    ids_N, domains_N = choices.fact("token_ids"), choices.fact("domain_ids")
    if texts is not None and ids_N is not None:
        _check_tokens(ids_N, texts, trace)
    found = _Finder(choices, _kinds(choices, texts), None if ids_N is None else frequent(ids_N), seed)
    layers = []
    for layer in trace.fingerprint.layers:
        layers.append(found.layer(layer))
        told(layer.layer)
    tokens_M = (
        [] if domains_N is None else np.bincount(domains_N[domains_N >= 0], minlength=len(trace.domains)).tolist()
    )
    return Findings(
        family=trace.fingerprint.family,
        num_tokens=choices.num_tokens,
        num_texts=int(choices.unit_of_N.max()) + 1,
        domains=list(trace.domains) if domains_N is not None else [],
        domain_tokens=tokens_M,
        classes=list(CLASSES) if "class" in found.kinds else [],
        layers=layers,
    )


def _check_tokens(ids_N: np.ndarray, texts: TokenTexts, trace: Trace) -> None:
    highest = int(ids_N.max())
    if highest >= texts.vocab_size:
        raise DataError(
            f"{trace.path} has token id {highest}, and this tokenizer knows 0 to {texts.vocab_size - 1}; give the "
            "tokenizer that its text was made with"
        )


def _kinds(choices: Choices, texts: TokenTexts | None) -> dict[str, _Labels]:
    """The kinds of labels that this trace knows of its tokens."""
    kinds: dict[str, _Labels] = {}
    domains_N, ids_N, num_domains = choices.fact("domain_ids"), choices.fact("token_ids"), len(choices.trace.domains)
    if domains_N is not None and num_domains > 1:
        kinds["domain"] = _Labels(domains_N, num_domains, _over_texts(domains_N, choices))
    if ids_N is None:
        return kinds
    if texts is not None:
        there = np.unique(ids_N)
        # Tokens that do not occur need no text.
        spelled = [""] * (int(there[-1]) + 1)
        for token_id in there.tolist():
            spelled[token_id] = texts.text(token_id)
        classes_N = classes_of(spelled, ids_N, choices.text_starts_N)
        kinds["class"] = _Labels(classes_N, len(CLASSES), _over_tokens(classes_N))
    next_ids_N = choices.next_ids_N
    assert next_ids_N is not None, "known together with the ids"
    for name, ids in (("token", ids_N), ("next token", next_ids_N)):
        labels = frequent(ids)
        if len(labels.ids_X) > 1:
            kinds[name] = _Labels(labels.labels_N, len(labels.ids_X), _over_tokens(labels.labels_N))
    return kinds


def _over_tokens(labels_N: np.ndarray) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda generator: generator.permutation(labels_N)


def _over_texts(labels_N: np.ndarray, choices: Choices) -> Callable[[np.random.Generator], np.ndarray]:
    """Whole texts change places, since neighbours in a text are alike and are no independent samples."""
    units_N = choices.unit_of_N
    label_of_unit = np.full(int(units_N.max()) + 1, -1, dtype=np.int64)
    label_of_unit[units_N] = labels_N
    return lambda generator: generator.permutation(label_of_unit)[units_N]


class _Finder:
    """Measures layers, each against the same shuffles."""

    def __init__(self, choices: Choices, kinds: dict[str, _Labels], tokens: Frequent | None, seed: int) -> None:
        self.choices, self.kinds, self.tokens = choices, kinds, tokens
        generator = np.random.default_rng(seed)
        self.shuffles = {name: [kind.shuffled(generator) for _ in range(SHUFFLES)] for name, kind in self.kinds.items()}
        num_cells = sum(layer.num_experts**2 for layer in choices.trace.fingerprint.layers)
        self.shows_company = num_cells <= MOST_CELLS

    def layer(self, layer: LayerFingerprint) -> LayerFindings:
        """Everything that is found about one layer."""
        rows = self.choices.rows(layer.layer)
        tokens_R, experts_R = rows
        counts_E = np.bincount(experts_R, minlength=layer.num_experts)
        tables = {name: self._cross(kind.labels_N, kind.num_labels, rows, layer) for name, kind in self.kinds.items()}
        shuffled = {name: self._shuffled(name, rows, layer) for name in self.kinds}
        entropy, together = load_entropy(counts_E), co_activation(self.choices.matrix(layer.layer), layer.num_experts)
        domains, classes = tables.get("domain"), tables.get("class")
        return LayerFindings(
            layer=layer.layer,
            router=layer.router,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            rows_per_token=len(tokens_R) / self.choices.num_tokens,
            counts=counts_E.tolist(),
            mean_weights=self._mean_weights(layer, counts_E),
            max_violation=_known(max_violation(counts_E)),
            load_entropy=_known(entropy),
            effective_experts=_known(effective_experts(counts_E)),
            variation=_known(coefficient_of_variation(counts_E)),
            states=self._states(layer, rows, counts_E),
            domain_counts=None if domains is None else domains.tolist(),
            class_counts=None if classes is None else classes.tolist(),
            divergence=self._against("domain", tables, shuffled, divergence_from_average),
            domain_divergence=None if domains is None else _known(domain_divergence(domains)),
            information={
                name: against
                for name in self.kinds
                if (against := self._against(name, tables, shuffled, information)) is not None
            },
            vocabulary=self._vocabulary(tables, shuffled),
            loved=None if self.tokens is None or "token" not in tables else loved(self.tokens, tables["token"]),
            pairs=_companions(together),
            company=_rounded(together.lift_EE) if self.shows_company else None,
        )

    def _states(self, layer: LayerFingerprint, rows: tuple[np.ndarray, np.ndarray], counts_E: np.ndarray) -> list[str]:
        """Judged as so many independent tokens as these texts are worth."""
        units_N, num_units = self.choices.unit_of_N, int(self.choices.unit_of_N.max()) + 1
        tokens_U = np.bincount(units_N, minlength=num_units)
        repeats = clumping(self._cross(units_N, num_units, rows, layer), tokens_U)
        found = expert_states(counts_E, num_tokens=self.choices.num_tokens, top_k=layer.top_k, clumping=repeats)
        return [each.state for each in found]

    def _cross(
        self, labels_N: np.ndarray, num_labels: int, rows: tuple[np.ndarray, np.ndarray], layer: LayerFingerprint
    ) -> Counts:
        return cross(labels_N, num_labels, *rows, layer.num_experts)

    def _shuffled(self, name: str, rows: tuple[np.ndarray, np.ndarray], layer: LayerFingerprint) -> list[Counts]:
        return [self._cross(labels, self.kinds[name].num_labels, rows, layer) for labels in self.shuffles[name]]

    def _against(
        self,
        name: str,
        tables: dict[str, Counts],
        shuffled: dict[str, list[Counts]],
        measure: Callable[[Counts], float],
    ) -> Against | None:
        if name not in tables:
            return None
        return Against(
            _known(measure(tables[name])), _known(float(np.mean([measure(each) for each in shuffled[name]])))
        )

    def _vocabulary(self, tables: dict[str, Counts], shuffled: dict[str, list[Counts]]) -> dict[str, Against]:
        found = {}
        for name in ("token", "next token"):
            if name in self.kinds:
                labels_N = self.kinds[name].labels_N
                times_X = np.bincount(labels_N[labels_N >= 0], minlength=self.kinds[name].num_labels)
                found[name] = self._against(
                    name, tables, shuffled, lambda counts, times_X=times_X: specialisation(counts, times_X)
                )
        return found

    def _mean_weights(self, layer: LayerFingerprint, counts_E: np.ndarray) -> list[float | None]:
        """Of the rows that experts computed; None for experts without any."""
        rows = self.choices.trace.rows(layer.layer)
        sums_E = np.bincount(rows.expert_ids_R, weights=rows.weights_R, minlength=len(counts_E))
        computed_E = np.bincount(rows.expert_ids_R, minlength=len(counts_E))
        return [round(float(s / c), 4) if c else None for s, c in zip(sums_E, computed_E, strict=True)]


def _companions(together: CoActivation) -> list[Companions]:
    """The pairs that are surely together beyond chance, the highest lift first."""
    pairs = sorted(together.pairs, key=lambda pair: -pair.lift)
    share_EE = together.share_EE
    return [Companions(pair.first, pair.second, float(share_EE[pair.first, pair.second]), pair.lift) for pair in pairs]


def _rounded(table: np.ndarray) -> list[list[float | None]]:
    return [[None if math.isnan(value) else round(value, 2) for value in row] for row in table.tolist()]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _named(layer: LayerFindings) -> dict[str, Any]:
    """asdict leaves named tuples as they are: fields by their names here."""

    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {name: plain(item) for name, item in value._asdict().items()}
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    return {name: plain(value) for name, value in vars(layer).items()}
