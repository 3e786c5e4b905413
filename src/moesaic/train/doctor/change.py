"""What became of the routers between two checkpoints, by what both choose for the same text.

E experts.
"""

import math
from typing import Literal, NamedTuple

from moesaic.errors import ConfigError
from moesaic.telemetry.drift import Saturation, load_distance, saturation
from moesaic.train.doctor.examination import Examination, LayerReport

SETTLED, UNSETTLED = 0.9, 0.5
"""Of the choices that chance alone would not share: from here on a router has settled, below it is not settled yet.
OLMoE's share about 0.6 after the first hundredth of training, over 0.8 after the first half (arXiv:2409.02060, fig. 17)
[M]; a router that is fine-tuned from where it stood should lie above both."""

MEANING = {
    "settled": "the router has settled",
    "moving": "the router is still moving",
    "unsettled": "the router makes other choices than before, so that what experts had learned goes to other tokens",
}


class LayerChange(NamedTuple):
    """One layer: choices that both share, the part of the rows that changed experts in total, experts that no token
    reaches now and some did before, and the other way round."""

    layer: int
    shared: Saturation
    moved: float
    died: tuple[int, ...]
    revived: tuple[int, ...]

    @property
    def beyond_chance(self) -> float:
        """Of the choices that chance would not share, 0 (or less) to 1."""
        return (self.shared.share - self.shared.chance) / max(1e-9, 1 - self.shared.chance)

    @property
    def state(self) -> Literal["settled", "moving", "unsettled"]:
        """Whether the router still changes."""
        if self.beyond_chance >= SETTLED:
            return "settled"
        return "moving" if self.beyond_chance >= UNSETTLED else "unsettled"

    @property
    def sentence(self) -> str:
        """What was seen, and what it means."""
        share, chance = self.shared.share, self.shared.chance
        told = f"layer {self.layer}: {share:.0%} of the choices were made before, too ({chance:.0%} by chance)"
        if self.died:
            told += f", and experts {', '.join(map(str, self.died))} have died since"
        return f"{told}: {MEANING[self.state]}"


def changes(earlier: Examination, later: Examination) -> tuple[LayerChange, ...]:
    """Every layer that routes. Raises ConfigError for examinations of other text, or of models of other shapes."""
    if earlier.text_digest != later.text_digest:
        raise ConfigError("the two checkpoints read the text as other tokens; compare two with the same tokenizer")
    shapes = [[(each.load.layer, each.load.num_experts) for each in one.layers] for one in (earlier, later)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            "the two checkpoints route in other layers, or over other numbers of experts; compare two of one model"
        )
    return tuple(
        LayerChange(
            now.load.layer,
            saturation(earlier.choices[now.load.layer], later.choices[now.load.layer], now.load.num_experts),
            _or_zero(load_distance(before.load.counts_E, now.load.counts_E)),
            tuple(sorted(_dead(now) - _dead(before))),
            tuple(sorted(_dead(before) - _dead(now))),
        )
        for before, now in zip(earlier.layers, later.layers, strict=True)
    )


def _dead(report: LayerReport) -> set[int]:
    return {state.expert for state in report.states if state.state == "dead"}


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
