"""What a balance loss counts: each layer by itself, and what routers chose rather than what capacity let through.

E experts, K choices a token. A loss of Switch's form is an affine function of E * sum_i f_i P_i; which f it is made of
is seen from its values for routings of known f, whatever its coefficient.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.train.lint.checks import Seen, check
from moesaic.train.lint.patterns import collapsed, dealt, graded, loads
from moesaic.train.lint.processes import Elsewhere
from moesaic.train.lint.report import NotMeasured
from moesaic.train.lint.scale import pull
from moesaic.train.lint.stand import Logits, Stand

HEAVY = (0.95, 0.8, 0.65)
FITS, IS_FORM = 0.005, 0.02
ROUNDING = 6e-8  # of a loss in fp32


def value(stand: Stand, logits: Logits) -> float:
    """The loss of a step with this routing; the prediction's part of it is the same for any."""
    return stand.run(logits).loss


def _even(stand: Stand) -> list[int]:
    total, experts = stand.num_tokens, stand.num_experts
    return [total // experts + (first < total % experts) for first in range(experts)]


@check(
    "layers pooled in the balance loss",
    why="Where counts are summed over layers before they are multiplied, layers that collapsed onto different experts "
    "cancel out: the loss calls them balanced, and nothing brings them back.",
    source="transformers 28255, 31464; OLMoE ships a corrected copy of the same function",
    remedy="compute the loss of each layer and average these; for a transformers model: "
    "moesaic.hub.transformers.correct_balance_loss(model)",
)
def layers_pooled(stand: Stand, elsewhere: Elsewhere) -> Seen:
    """All layers collapsed onto the same experts, and each onto others."""
    num_layers, experts, top_k = len(stand.blocks), stand.num_experts, stand.top_k
    if num_layers < 2:
        raise NotMeasured("one layer with experts, which has none to be pooled with")
    stand.once(pull)
    even = value(stand, dealt(stand, _even(stand)))
    same = value(stand, collapsed(stand, [0] * num_layers))
    apart = value(stand, collapsed(stand, [layer * top_k % experts for layer in range(num_layers)]))
    _refuse_faint(same - even, same)
    part = (apart - even) / (same - even)
    worst = experts / top_k
    score = 1 + part * (worst - 1)
    says = (
        f"{num_layers} layers, each collapsed onto other experts, score {score:.2f}, where {worst:.2f} is due "
        "and 1.00 is perfect balance"
    )
    measured = {"score": score, "due": worst, "layers": num_layers}
    return Seen(part < 1 - IS_FORM, says, measured)


class Form(NamedTuple):
    """A hypothesis: f is of counts up to a capacity (None: of all), divided by their sum or by all choices."""

    capacity: int | None
    by_sum: bool

    def score(self, load_E: Tensor) -> float:
        """E * sum_i f_i P_i where P is the share of what was chosen."""
        kept_E = load_E if self.capacity is None else load_E.clamp(max=self.capacity)
        return float(len(load_E) * (kept_E / (kept_E if self.by_sum else load_E).sum() * load_E / load_E.sum()).sum())


@check(
    "balance loss counted after dropping",
    why="Counts taken after a capacity has dropped rows cannot exceed it: the more an expert is overloaded, the less "
    "of it the loss sees.",
    source="Switch (arXiv:2101.03961) counts before dropping; Megatron-LM d98e8a6, router.py 746-836",
    remedy="count what the router chose, before the capacity",
)
def loss_after_dropping(stand: Stand, elsewhere: Elsewhere) -> Seen:
    """Values of the loss for loads from even to one expert alone, against those of every capacity."""
    stand.once(pull)
    dealings = [_even(stand), *(graded(stand, heavy) for heavy in HEAVY)]
    alone = [stand.num_tokens, *[0] * (stand.num_experts - 1)]
    load_NE = [loads(stand, counts) for counts in (*dealings, alone)]
    values = [value(stand, dealt(stand, counts)) for counts in (*dealings, alone)]
    _refuse_faint(max(values) - min(values), max(map(abs, values)))
    plain = _misfit(Form(None, True), load_NE, values)
    if plain < IS_FORM:
        return Seen(False, f"its values are those of what was chosen, to {plain:.1%}", {"misfit": plain})
    misfit, best = min((_misfit(form, load_NE, values), form) for form in _forms(load_NE))
    if misfit > FITS:
        raise NotMeasured("the balance loss is not of Switch's form, whose values would tell what it counts")
    most = int(max(load_E.max() for load_E in load_NE))
    says = f"its values are those of counts up to {best.capacity} rows an expert, where {most} were chosen"
    return Seen(True, says, {"capacity": best.capacity, "chosen": most, "misfit": misfit, "misfit_of_chosen": plain})


def _forms(load_NE: Sequence[Tensor]) -> Iterator[Form]:
    for capacity in range(1, int(max(load_E.max() for load_E in load_NE))):
        yield Form(capacity, True)
        yield Form(capacity, False)


def _misfit(form: Form, load_NE: Sequence[Tensor], values: Sequence[float]) -> float:
    """How far values are from an affine function of the form's scores, as a part of their spread."""
    scores = torch.tensor([form.score(load_E) for load_E in load_NE], dtype=torch.float64)
    wanted = torch.tensor(values, dtype=torch.float64)
    given = torch.stack((scores, torch.ones_like(scores)), dim=1)
    solution = torch.linalg.lstsq(given, wanted[:, None], driver="gelsd").solution
    return float((given @ solution - wanted[:, None]).abs().max() / (wanted.max() - wanted.min()))


def _refuse_faint(spread: float, loss: float) -> None:
    """A spread that rounding could have made says nothing."""
    if abs(spread) * IS_FORM < 4 * ROUNDING * abs(loss):
        raise NotMeasured(
            f"uneven routing changes the loss by {abs(spread):.1e} of {abs(loss):.3g}, which is lost in rounding; "
            "raise the balance loss's coefficient for lint"
        )
