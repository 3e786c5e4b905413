"""What an inspection found, in sentences: what would be said first to somebody who asks."""

from collections.abc import Callable, Iterator, Sequence

from moesaic.telemetry.inspection.findings import Against, Findings, LayerFindings
from moesaic.telemetry.inspection.inspection import Agreement, Inspection
from moesaic.telemetry.report_data import Verdict

HEAVY = 3.0  # times the fair share: above it a layer is called uneven, as in telemetry/health.py
CLEARLY = 1.25  # times the shuffled baseline, above which a difference is believed
_ILL = {
    "dead": "are dead, below a tenth of their fair share",
    "cold": "are cold, below half of their fair share",
    "oversized": "do the work of several",
}
_LABELS = {"domain": "the domain", "class": "the kind of token", "token": "the token", "next token": "the next token"}


def verdicts(inspection: Inspection) -> tuple[Verdict, ...]:
    """Sentences about the first model, then about the two, then about the way there."""
    found = inspection.subjects[0].findings
    sentences = [*_health(found), *_domains(found), *_labels(found), *_company(found)]
    if inspection.saturation is not None:
        sentences += _saturation(inspection.saturation)
    if len(inspection.subjects) > 1:
        sentences.append(_agreement(inspection))
    return tuple(sentences)


def _health(found: Findings) -> Iterator[Verdict]:
    states = [(state, layer.layer, expert) for layer in found.layers for expert, state in enumerate(layer.states)]
    for state, meaning in _ILL.items():
        ill = [f"layer {layer} expert {expert}" for each, layer, expert in states if each == state]
        if ill:
            more = f" and {len(ill) - 6} more" if len(ill) > 6 else ""
            named = ", ".join(ill[:6]) + more
            yield Verdict(text=f"{len(ill)} of {len(states)} experts {meaning}: {named}.", is_good=False)
    unknown = sum(state == "unknown" for state, _, _ in states)
    if not any(state in _ILL for state, _, _ in states):
        yield Verdict(text=f"None of the {len(states)} experts is surely dead, cold or oversized.", is_good=True)
    if unknown:
        yield Verdict(
            text=f"{unknown} experts are far from their fair share, which may be chance in {found.num_texts} pieces of "
            "text; read more with --max-tokens."
        )
    heaviest = max(found.layers, key=lambda layer: layer.max_violation or 0.0)
    if heaviest.max_violation is not None:
        expert = heaviest.counts.index(max(heaviest.counts))
        heavy = heaviest.max_violation + 1
        yield Verdict(
            text=f"The heaviest expert, layer {heaviest.layer} expert {expert}, has {heavy:.1f} times its fair share.",
            is_good=heavy <= HEAVY,
        )


def _domains(found: Findings) -> Iterator[Verdict]:
    layer = _strongest(found.layers, lambda layer: layer.divergence)
    if layer is None or layer.divergence is None or not layer.divergence.value:
        return
    value, shuffled = layer.divergence.value, layer.divergence.shuffled or 0.0
    if value < CLEARLY * shuffled:
        yield Verdict(text=f"Domains use the experts alike: {value:.3f} bits apart at most, {shuffled:.3f} by chance.")
        return
    yield Verdict(
        text=f"Experts specialise by domain most at layer {layer.layer}: each domain's load is {value:.3f} bits from "
        f"the average of all (Jensen-Shannon), {shuffled:.3f} by chance."
    )


def _labels(found: Findings) -> Iterator[Verdict]:
    """What experts go by: beyond chance, and strongest in which layer."""
    parts = []
    for name, words in _LABELS.items():
        layer = _strongest(found.layers, lambda layer, name=name: layer.information.get(name))
        against = None if layer is None else layer.information[name]
        if layer is None or against is None or against.value is None or against.shuffled is None:
            continue
        if against.value >= CLEARLY * against.shuffled:
            parts.append(
                (
                    against.value - against.shuffled,
                    f"{words} {against.value - against.shuffled:.2f} (layer {layer.layer})",
                )
            )
    if parts:
        told = ", ".join(text for _, text in sorted(parts, reverse=True))
        yield Verdict(text=f"What tells most of a token's expert, in bits beyond chance: {told}.")


def _company(found: Findings) -> Iterator[Verdict]:
    pairs = [(pair.lift, layer.layer, pair) for layer in found.layers for pair in layer.pairs]
    if pairs:
        lift, layer, pair = max(pairs)
        yield Verdict(
            text=f"Closest company: experts {pair.first} and {pair.second} of layer {layer} serve the same token "
            f"{lift:.1f} times as often as their loads alone would bring."
        )


def _saturation(saturation: Agreement) -> list[Verdict]:
    first = mean([values[0] for values in saturation.layers.values()])
    chance = mean([values[0] for values in saturation.chance.values()])
    if first is None:
        return []
    told = f"At {saturation.names[0]} the routers made {first:.0%} of their final choices"
    return [Verdict(text=f"{told}; {chance or 0.0:.0%} is chance.")]


def _agreement(inspection: Inspection) -> Verdict:
    left, right = (subject.name for subject in inspection.subjects)
    if inspection.agreement is None:
        return Verdict(text=f"{left} and {right} stand side by side only: {inspection.why_not}.")
    share = mean([values[0] for values in inspection.agreement.layers.values()])
    chance = mean([values[0] for values in inspection.agreement.chance.values()])
    return Verdict(text=f"{right} makes {share or 0.0:.0%} of the choices of {left}; {chance or 0.0:.0%} is chance.")


def _strongest(layers: Sequence[LayerFindings], of: Callable[[LayerFindings], Against | None]) -> LayerFindings | None:
    """The layer whose measure is furthest above its baseline; None where no layer has it."""
    there = [layer for layer in layers if (against := of(layer)) is not None and against.value is not None]
    return max(there, key=lambda layer: _beyond(of(layer)), default=None)


def _beyond(against: Against | None) -> float:
    return 0.0 if against is None else (against.value or 0.0) - (against.shuffled or 0.0)


def mean(values: Sequence[float | None]) -> float | None:
    """Of what is known; None where nothing is."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
