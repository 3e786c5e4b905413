"""What an inspection found, in sentences: what would be said first to somebody who asks."""

from collections.abc import Callable, Iterator, Sequence

from moesaic.telemetry.inspection.findings import Against, Findings, LayerFindings
from moesaic.telemetry.inspection.inspection import Agreement, Inspection
from moesaic.telemetry.report_data import Verdict

HEAVY = 3.0  # times the fair share: above it a layer is called uneven, as in telemetry/health.py
CLEARLY = 1.25  # times the shuffled baseline, above which a difference is believed
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
    dead = [(layer.layer, expert) for layer in found.layers for expert in layer.dead or ()]
    unknown = [layer.layer for layer in found.layers if layer.dead is None]
    num_experts = sum(layer.num_experts for layer in found.layers)
    if dead:
        named = ", ".join(f"layer {layer} expert {expert}" for layer, expert in dead[:6])
        more = f" and {len(dead) - 6} more" if len(dead) > 6 else ""
        yield Verdict(text=f"{len(dead)} of {num_experts} experts are dead here: {named}{more}.", is_good=False)
    elif not unknown:
        yield Verdict(text=f"None of the {num_experts} experts is dead.", is_good=True)
    if unknown:
        few = f"{found.num_tokens} tokens are too few to tell the dead from the unlucky"
        yield Verdict(text=f"{few} in layer {_listed(unknown)}; read more with --max-tokens.")
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
    pairs = [(pair.ratio, layer.layer, pair) for layer in found.layers for pair in layer.pairs]
    if pairs:
        ratio, layer, pair = max(pairs)
        yield Verdict(
            text=f"Closest company: experts {pair.first} and {pair.second} of layer {layer} serve the same token "
            f"{ratio:.1f} times as often as their loads alone would bring."
        )


def _saturation(saturation: Agreement) -> list[Verdict]:
    mean = [_mean([values[at] for values in saturation.layers.values()]) for at in range(len(saturation.names))]
    if not mean or mean[0] is None:
        return []
    return [Verdict(text=f"At {saturation.names[0]} the routers made {mean[0]:.0%} of their final choices already.")]


def _agreement(inspection: Inspection) -> Verdict:
    left, right = (subject.name for subject in inspection.subjects)
    if inspection.agreement is None:
        return Verdict(text=f"{left} and {right} stand side by side only: {inspection.why_not}.")
    mean = _mean([values[0] for values in inspection.agreement.layers.values()])
    chance = _mean(list(inspection.agreement.chance.values()))
    return Verdict(text=f"{right} makes {mean or 0.0:.0%} of the choices of {left}; {chance or 0.0:.0%} is chance.")


def _strongest(layers: Sequence[LayerFindings], of: Callable[[LayerFindings], Against | None]) -> LayerFindings | None:
    """The layer whose measure is furthest above its baseline; None where no layer has it."""
    there = [layer for layer in layers if (against := of(layer)) is not None and against.value is not None]
    return max(there, key=lambda layer: _beyond(of(layer)), default=None)


def _beyond(against: Against | None) -> float:
    return 0.0 if against is None else (against.value or 0.0) - (against.shuffled or 0.0)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" and others" if len(numbers) > 8 else "")
