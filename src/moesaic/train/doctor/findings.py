"""What is ill about a router and its experts, in words. E experts, W windows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from moesaic.telemetry.drift import router_state
from moesaic.telemetry.likeness import Duplicate
from moesaic.telemetry.load import LayerLoad, StepLoad, sum_loads
from moesaic.telemetry.states import ExpertState, clumping, states_of

Kind = Literal["oversized", "dead", "duplicate", "cold", "unstable", "dropping"]

DROPPING = 0.1  # of the rows, above which a capacity is called too tight
PARTS = 5  # of a window, between which loads are compared

MEANING: dict[Kind, str] = {
    "oversized": "one expert does the work of several, so the others learn less than they could",
    "dead": "it takes no part, so it gets no gradient and stays as it is",
    "duplicate": "two experts that answer the same are one expert at the price of two",
    "cold": "few tokens reach it, so it learns slowly",
    "unstable": "choices that hang on the last bit change from machine to machine, and hard logits leave no gradient",
    "dropping": "rows without a slot teach nobody, and evaluation sees another model than training does",
}


class Key(NamedTuple):
    """Which finding it is, from window to window."""

    kind: Kind
    layer: int
    expert: int


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is ill. expert: -1 where it is the layer's; other: the second of two duplicates, else -1."""

    kind: Kind
    layer: int
    expert: int = -1
    other: int = -1
    measured: str

    @property
    def key(self) -> Key:
        return Key(self.kind, self.layer, self.expert)

    @property
    def sentence(self) -> str:
        """What was seen, and what it means."""
        return f"layer {self.layer}: {self.measured}: {MEANING[self.kind]}"


def findings_in(
    window: Sequence[StepLoad],
    duplicates: Mapping[int, Sequence[Duplicate]] | None = None,
    mute: Mapping[int, Sequence[int]] | None = None,
) -> tuple[Finding, ...]:
    """Everything that is ill in a window of steps, worst first. duplicates: by layer, where experts were asked. mute:
    by layer, experts whose weights are zero, which tokens may well reach."""
    if not window:
        return ()
    together = sum_loads(window)
    found = [
        Finding(kind="dead", layer=layer, expert=expert, measured=f"all weights of expert {expert} are 0")
        for layer, experts in (mute or {}).items()
        for expert in experts
    ]
    for index, load in enumerate(together.layers):
        steps = [step.layers[index] for step in window]
        found += _layer_findings(load, steps, (duplicates or {}).get(load.layer, ()))
    order = list(MEANING)
    once = {finding.key: finding for finding in reversed(found)}.values()  # what has no weights has no tokens, either
    return tuple(sorted(once, key=lambda finding: (order.index(finding.kind), finding.layer, finding.expert)))


def _layer_findings(load: LayerLoad, steps: list[LayerLoad], duplicates: Sequence[Duplicate]) -> list[Finding]:
    counts_WE = np.array([step.counts_E for step in steps])
    states = states_of(load, clumping=clumping(counts_WE, [step.num_tokens for step in steps]))
    found = [_of_state(load.layer, state) for state in states if state.state in ("dead", "cold", "oversized")]
    found += [
        Finding(kind="duplicate", layer=load.layer, expert=pair.first, other=pair.second, measured=_pair(pair))
        for pair in duplicates
    ]
    parts = [part.sum(axis=0) for part in np.array_split(counts_WE, min(PARTS, len(counts_WE)))]
    state = router_state(load, parts)
    if state.is_unstable:
        found.append(Finding(kind="unstable", layer=load.layer, measured="; ".join(state.reasons)))
    if load.dropped_share > DROPPING:
        found.append(
            Finding(kind="dropping", layer=load.layer, measured=f"{load.dropped_share:.0%} of the rows are dropped")
        )
    return found


def _of_state(layer: int, state: ExpertState) -> Finding:
    kinds: dict[str, Kind] = {"dead": "dead", "cold": "cold", "oversized": "oversized"}
    measured = f"expert {state.expert} has {state.ratio:.2f} of its fair share"
    return Finding(kind=kinds[state.state], layer=layer, expert=state.expert, measured=measured)


def _pair(pair: Duplicate) -> str:
    return f"experts {pair.first} and {pair.second} give the same answers (cosine {pair.similarity:.3f})"
