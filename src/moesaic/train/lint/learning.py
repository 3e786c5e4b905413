"""Whether every expert learns. E experts."""

from torch import Tensor

from moesaic.train.lint.checks import Seen, check
from moesaic.train.lint.patterns import in_turn
from moesaic.train.lint.processes import Elsewhere
from moesaic.train.lint.stand import Stand, reached


@check(
    "experts without gradient",
    why="An expert that gets tokens and no gradient stays what it was when the model was built, while the report of "
    "what is trained may say otherwise.",
    source="unsloth 6936 (experts left frozen while printing that they train); pytorch 172439, DeepSpeed 5066",
    remedy="see whether these weights require gradients, are detached, or are read as copies; an adapter that leaves "
    "them frozen on purpose is no mistake",
)
def experts_without_gradient(stand: Stand, elsewhere: Elsewhere) -> Seen:
    """Routing that gives every expert tokens, in as many steps as that takes."""
    total = stand.num_tokens
    found: list[set[int]] = [set() for _ in stand.blocks]
    for start in range(0, stand.num_experts, total):
        gradients = stand.run(in_turn(stand.num_experts, start), silent=False).gradients
        for experts, block in zip(found, stand.blocks, strict=True):
            own: dict[str, Tensor | None] = {name: gradients.get(name) for name in block.expert_weights(stand.model)}
            experts |= reached(block, own)
    everyone = set(range(stand.num_experts))
    without = {
        block.name: sorted(everyone - experts)
        for block, experts in zip(stand.blocks, found, strict=True)
        if experts != everyone
    }
    number, of = sum(map(len, without.values())), stand.num_experts * len(stand.blocks)
    where = "; ".join(f"{name}: {experts}" for name, experts in without.items())
    says = f"{number} of {of} experts get tokens and no gradient" + (f" ({where})" if where else "")
    return Seen(bool(without), says, {"experts": without, "number": number, "of": of})
