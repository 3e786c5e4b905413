"""Whether a balance loss weighs the same however a step is cut: into micro-batches, over ranks, with padding.

The experts are silenced, so that routers' gradients are the balance losses' alone; all outside the blocks shows what
becomes of the prediction's gradient meanwhile. Their ratios' ratio is the factor.
"""

from typing import Any

import torch
from torch import Tensor

from moesaic.train.lint.checks import Seen, check
from moesaic.train.lint.patterns import lopsided
from moesaic.train.lint.processes import Elsewhere
from moesaic.train.lint.report import NotMeasured
from moesaic.train.lint.stand import Measured, Stand

ACCUMULATED = (2, 4)
TOLERANCE = 0.02


def pull(stand: Stand) -> tuple[Measured, Tensor, Tensor]:
    """A step of one lopsided micro-batch, and the gradients of routers and of all outside the blocks.

    Raises NotMeasured where nothing pulls at the routers.
    """
    stand.require_trained_routers()
    measured = stand.run(lopsided(stand.num_experts))
    routers = stand.routers(measured.gradients)
    if not float(routers.norm()) > 0:
        raise NotMeasured("no balance loss: lopsided routing pulls at no router")
    return measured, routers, stand.others(measured.gradients)


def times(found: Tensor, wanted: Tensor) -> float:
    """How many times `wanted` is in `found`: the projection's length. 1 where there is nothing to compare."""
    if found.shape != wanted.shape or not float(wanted.norm()) > 0:
        return 1.0
    return float(found @ wanted / (wanted @ wanted))


@check(
    "balance loss over micro-batches",
    why="With n micro-batches in a step the balance loss weighs n times as much beside the prediction as with one: the "
    "coefficient means something else in every layout, and routing is levelled at the cost of the model.",
    source="measured on transformers 5.23: x2 at 2, x4 at 4; also Automodel 3359, trl 6083, Megatron-LM 3672",
    remedy="divide each micro-batch's balance loss by their number (better: weigh it by its share of the step's "
    "targets); for a transformers model: moesaic.hub.transformers.correct_balance_loss(model)",
)
def over_micro_batches(stand: Stand, elsewhere: Elsewhere) -> Seen:
    """The same micro-batch once, twice and four times in a step."""
    _, routers, others = stand.once(pull)
    factors: dict[str, Any] = {}
    for number in ACCUMULATED:
        gradients = stand.run(lopsided(stand.num_experts), [stand.set_up.batch] * number).gradients
        factors[str(number)] = times(stand.routers(gradients), routers) / times(stand.others(gradients), others)
    said = ", ".join(f"x{factor:.2f} with {number}" for number, factor in factors.items())
    return Seen(
        _is_off(factors.values()), f"the balance gradient beside the prediction's: {said}", {"factors": factors}
    )


@check(
    "balance loss over ranks",
    why="On n ranks the balance loss weighs n times as much beside the prediction as on one, so that what was tuned on "
    "one machine is another loss on the next.",
    source="transformers 48690; Megatron-LM 3672",
    remedy="average the balance loss over ranks as the prediction's is; for a transformers model: "
    "moesaic.hub.transformers.correct_balance_loss(model)",
)
def over_ranks(stand: Stand, elsewhere: Elsewhere) -> Seen:
    """The same micro-batch on one rank and on several."""
    _, routers, others = stand.once(pull)
    their_routers, their_others = elsewhere.lopsided_step(stand)
    factor = times(their_routers, routers) / times(their_others, others)
    says = f"the balance gradient beside the prediction's: x{factor:.2f} on {elsewhere.size} ranks"
    return Seen(_is_off([factor]), says, {"factors": {str(elsewhere.size): factor}})


@check(
    "padding in the balance loss",
    why="Padding is routed like text, and all alike: where it counts, experts are levelled for tokens that mean "
    "nothing, and batches with much padding push hardest.",
    source="transformers 28505, Megatron-LM 1984, torchtitan 4594",
    remedy="leave padding out of counts and probabilities (pass the attention_mask to the balance loss; collate with "
    "one)",
)
def padding(stand: Stand, elsewhere: Elsewhere) -> Seen:
    """The same micro-batch with half as many columns of padding after it."""
    set_up, (_, routers, _) = stand.set_up, stand.once(pull)
    columns = set_up.columns(set_up.batch)
    extra = max(1, columns // 2)
    padded = set_up.padded(set_up.batch, extra)
    if padded is None:
        raise NotMeasured("this set-up has no padding: its batches have no attention_mask, and its rows are all full")
    plain = stand.run(lopsided(stand.num_experts, real_columns=columns)).gradients
    gradients = stand.run(lopsided(stand.num_experts, real_columns=columns), [padded]).gradients
    change = float((stand.routers(gradients) - stand.routers(plain)).norm() / routers.norm())
    share = extra / (columns + extra)
    says = f"{share:.0%} padding changes the balance gradient by {change:.0%} of its size"
    return Seen(change > TOLERANCE, says, {"padding": share, "change": change})


def _is_off(factors: Any) -> bool:
    return any(not abs(torch.tensor(factor).item() - 1) <= TOLERANCE for factor in factors)
