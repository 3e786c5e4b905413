"""Selection biases, which choose experts and weigh nothing: whether they move, by what, and how groups are masked.

What a tensor is shows in what it does: it lets an expert be chosen, and no gradient reaches it. E experts.
"""

import torch
from torch import Tensor

from moesaic.train.lint.checks import Seen, check
from moesaic.train.lint.patterns import dealt, graded, loads
from moesaic.train.lint.processes import Elsewhere
from moesaic.train.lint.report import NotMeasured
from moesaic.train.lint.scale import pull
from moesaic.train.lint.stand import Probe, Stand, falling

LARGE, SHIFT = 100.0, 8.0
STEPS, HEAVY = 2, 0.9
TOKENS = 512


def selection_bias(stand: Stand) -> str:
    """The name of the first block's selection bias. Raises NotMeasured where there is none."""
    with stand.probing() as probe:
        for name in stand.first.per_expert:
            if _selects(probe, name, stand.num_experts):
                return name
    raise NotMeasured("no selection bias")


def _selects(probe: Probe, name: str, num_experts: int) -> bool:
    """Whether a large number in it makes an expert chosen that otherwise is not, without a gradient of its own."""
    tensor, z_E = probe.tensor(name), falling(num_experts, 0)
    before = probe.chosen(z_E)
    last = num_experts - 1
    if last in before:
        return False
    with torch.no_grad():
        tensor[last] += LARGE
        after = probe.chosen(z_E)
        tensor[last] -= LARGE
    if last not in after or not tensor.requires_grad:
        return last in after
    (gradient,) = torch.autograd.grad(probe.outputs(z_E[None]).sum(), [tensor], allow_unused=True)
    return gradient is None or not gradient.abs().max() > 0


@check(
    "balancing",
    why="Without a balance loss or a moving selection bias routers collapse onto few experts, unseen until training "
    "stalls; a coefficient in a configuration does not say that the loss is computed.",
    source="transformers 44243; Automodel 1232, 1408",
    remedy="add a balance loss (transformers: config.output_router_logits = True) or move a selection bias",
)
def anything_balances(stand: Stand, elsewhere: Elsewhere) -> Seen:
    """Lopsided routing, which must move something."""
    try:
        _, routers, _ = stand.once(pull)
        return Seen(False, "a balance loss pulls at the routers", {"gradient_norm": float(routers.norm())})
    except NotMeasured:
        pass
    try:
        name = stand.once(selection_bias)
    except NotMeasured:
        stand.require_trained_routers()
        return Seen(True, "lopsided routing pulls at no router, and there is no selection bias", {"gradient_norm": 0.0})
    return Seen(False, f"by the selection bias {name}, without a balance loss", {"gradient_norm": 0.0})


def _moves(stand: Stand) -> tuple[str, Tensor, Tensor]:
    """The bias, how it moved in a few steps of a graded load, and that load."""
    name = stand.once(selection_bias)
    counts = graded(stand, HEAVY)
    after = stand.run(dealt(stand, counts), steps=STEPS).after
    return name, after[name].double().cpu(), loads(stand, counts)


@check(
    "selection bias that never moves",
    why="A selection bias balances because it is moved by the loads of each step; one that stays where it was loaded, "
    "or starts at 0, does nothing.",
    source="arXiv:2408.15664, alg. 1; 32 model files of transformers 5.23 hold such a bias and none moves it",
    remedy="after each optimizer step move it by the step's counts over all micro-batches and ranks "
    "(moesaic.routing.balancers.update_selection_bias), or say that it is frozen on purpose",
)
def bias_never_moves(stand: Stand, elsewhere: Elsewhere) -> Seen:
    """Steps in which one expert gets most tokens."""
    name, moved_E, load_E = stand.once(_moves)
    largest = float(moved_E.abs().max())
    heaviest = float(load_E.max() / load_E.mean())
    says = f"{name} moved by {largest:.2g} in {STEPS} steps in which one expert had {heaviest:.1f} times the mean load"
    return Seen(largest == 0, says, {"moved": largest, "max_over_mean": heaviest, "steps": STEPS})


@check(
    "selection bias counted after dropping",
    why="After a capacity has dropped rows no expert has more than it: experts that are under-loaded by what was "
    "chosen look over-loaded, and with padding to the capacity all look alike.",
    source="Megatron-LM d98e8a6, router.py 746-836: with moe_pad_expert_input_to_capacity no bias moves",
    remedy="count what the router chose, before the capacity",
)
def bias_after_dropping(stand: Stand, elsewhere: Elsewhere) -> Seen:
    """An expert with a little less than the mean of what was chosen, and more than the mean of what was kept."""
    _, moved_E, load_E = stand.once(_moves)
    if not moved_E.abs().max() > 0:
        raise NotMeasured("the selection bias does not move")
    chosen = _likeness(moved_E, load_E)
    capped = [(_likeness(moved_E, load_E.clamp(max=capacity)), capacity) for capacity in range(1, int(load_E.max()))]
    best, capacity = max(capped)
    is_defect = best > chosen + 0.01
    after = f"; of counts up to {capacity} rows an expert {best:.2f}" if is_defect else ""
    says = f"it moves as counts of what was chosen ask, to a likeness of {chosen:.2f}{after}"
    return Seen(is_defect, says, {"likeness_chosen": chosen, "likeness_kept": best, "capacity": capacity})


def _likeness(moved_E: Tensor, load_E: Tensor) -> float:
    """The cosine of a bias's moves and those that counts ask for, by the sign or in proportion, centred or not."""
    distance_E = load_E.mean() - load_E
    found = []
    for wanted_E in (distance_E.sign(), distance_E):
        found.append(torch.cosine_similarity(moved_E, wanted_E, dim=0))
        found.append(torch.cosine_similarity(moved_E - moved_E.mean(), wanted_E - wanted_E.mean(), dim=0))
    return float(torch.stack(found).nan_to_num(-1).max())


@check(
    "groups masked with 0",
    why="Experts of groups that a token may not use are masked with 0, which is more than a biased score below 0: once "
    "biases are negative, tokens go to forbidden groups.",
    source="DeepSeek-V3 (arXiv:2412.19437), sec. 2.1.2; transformers 45440, sglang 3705",
    remedy="mask with -inf before the choice",
)
def groups_masked(stand: Stand, elsewhere: Elsewhere) -> Seen:
    """The same number on every bias, which must change no choice: once up, once down."""
    name, experts = stand.once(selection_bias), stand.num_experts
    generator = torch.Generator().manual_seed(0)
    z_TE = torch.randn(TOKENS, experts, generator=generator)
    with stand.probing() as probe, torch.no_grad():
        tensor = probe.tensor(name)
        tensor += torch.randn(experts, generator=generator).to(tensor) / 10
        outputs = []
        for shift in (0.0, SHIFT, -SHIFT):
            torch.manual_seed(0)
            tensor += shift
            outputs.append(_by_token(probe, z_TE))
            tensor -= shift
    up, down = (_changed(outputs[0], other) for other in outputs[1:])
    if up > 0.01:
        raise NotMeasured(f"{up:.0%} of tokens change experts when all biases rise alike: they are not added to scores")
    says = (
        f"{down:.1%} of tokens change experts when {SHIFT:.0f} is taken from every bias alike, which must change none"
    )
    return Seen(down > 0.01, says, {"changed_down": down, "changed_up": up})


def _by_token(probe: Probe, z_TE: Tensor) -> Tensor:
    """Outputs of as many tokens as the block takes at once, and of the others after them."""
    first = probe.outputs(z_TE)
    if len(first) >= len(z_TE):
        return first
    parts = [first]
    while sum(map(len, parts)) < len(z_TE):
        parts.append(probe.outputs(z_TE[sum(map(len, parts)) :]))
    return torch.cat(parts)


def _changed(y_TD: Tensor, other_TD: Tensor) -> float:
    """The share of tokens whose output is another one."""
    return float(((y_TD - other_TD).norm(dim=-1) > 1e-3 * y_TD.norm(dim=-1).clamp(min=1e-12)).double().mean())
