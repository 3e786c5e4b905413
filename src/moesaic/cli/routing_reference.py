"""Writes docs/routing.md from the routers, balance losses and capacities themselves.

`python -m moesaic.cli.routing_reference > docs/routing.md`. What a part is stands in its docstring, and what goes
together in `routing/combinations.py`.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from textwrap import dedent
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

from moesaic.config import SoftMoeConfig
from moesaic.config.capacity import CapacityConfig
from moesaic.config.router import ROUTER_KINDS, GroupConfig, RouterConfig, RouterKind
from moesaic.families import moesaic
from moesaic.routing import combinations
from moesaic.routing.balancers import BALANCE_LOSSES, move_penalty, update_selection_bias
from moesaic.routing.combinations import CAPACITIES, OPTIONS
from moesaic.routing.routers import ROUTERS

COMMAND = "python -m moesaic.cli.routing_reference > docs/routing.md"

_INTRODUCTION = """\
Any router, any balancer and any capacity in one configuration: the family `moesaic` has fields for all of them, and
layers may differ. What cannot go together is refused when the configuration is made, with what would work.

```toml
[model]
model_type = "moesaic"
hidden_size = 192
num_hidden_layers = 6
num_attention_heads = 6
num_experts = 32
num_experts_per_tok = 4
moe_intermediate_size = 96
shared_intermediate_size = 96
router = { name = "sigmoid_topk", selection_bias = true, groups = { num_groups = 8, top_groups = 4 } }
capacity = { factor = 1.25, drop = "probability", overflow = "shared" }

[[model.overrides]]            # the first layer looks its experts up
layers = [0]
router = { name = "hash", weight = "sqrt_softplus" }
capacity = { factor = 2.0 }

[train]
balance_losses = [["sequence", 1e-4], ["router_z", 1e-3]]
selection_bias_rate = 0.001
```

Train it with `moesaic train --config FILE --out FOLDER`. More recipes stand in
[examples/routers](../examples/routers)."""

_LEAKS = (
    "It leaks the future: tokens compete with later ones for a place. Models with it cannot generate token by token, "
    "and their loss is not comparable with others'."
)


_SCOPES = """\
The scope says over what a load is counted. "token" and "document": the loss is a mean over tokens, so that cutting a
step into micro-batches changes nothing. "micro-batch": each has its own loss, and their mean, weighted by tokens, is
minimised. "running": choices over all ranks and the step's micro-batches so far; "step": over all of them, by a first
pass without gradients. "weights": it looks at the router alone."""


def reference() -> str:
    """The whole page, Markdown."""
    parts = [
        "# Routing",
        f"<!-- Written by `{COMMAND}`; do not edit. -->",
        _INTRODUCTION,
        "## The model's fields",
        _fenced(moesaic),
        *_routers(),
        *_balancers(),
        *_capacity(),
    ]
    return "\n\n".join(parts) + "\n"


def _routers() -> Iterable[str]:
    yield "## Routers"
    yield ("T tokens, E experts, K choices a token (`num_experts_per_tok`); z logits, s scores, b biases, g weights.")
    yield _text(RouterConfig)
    yield _options_table()
    for name in ROUTER_KINDS:
        yield from _router(name, ROUTER_KINDS[name])
    yield "### Groups"
    yield _text(GroupConfig)
    yield "### Soft MoE"
    yield _text(SoftMoeConfig)
    yield "It is a layer of its own and has no router. It leaks the future."
    yield "```toml\nsoft_slots_per_expert = 4     # and no num_experts_per_tok, router, capacity or shared expert\n```"


def _router(name: str, kind: RouterKind) -> Iterable[str]:
    yield f"### {name}"
    yield _text(ROUTERS[name])
    facts = [_experts_a_token(name, kind), _renormalization(kind)]
    if kind.leaks:
        facts.append(_LEAKS)
    yield "\n".join(f"- {fact}" for fact in facts)
    if kind.settings is not None:
        yield _text(kind.settings)
        yield _bullets(_described(field) for field in dataclasses.fields(kind.settings))
    yield f"```toml\n{_example(name, kind)}\n```"


def _experts_a_token(name: str, kind: RouterKind) -> str:
    if name == "dense":
        return "Experts a token: all."
    if kind.fixed_top_k:
        return f"Experts a token: {kind.top_k or 'K'}, always."
    return f"Experts a token: {kind.top_k or 'K'} is what is aimed at; tokens differ."


def _renormalization(kind: RouterKind) -> str:
    if kind.renormalize is None:
        return "The chosen weights are divided by their sum, unless `renormalize = false`."
    return f"The chosen weights are {'always' if kind.renormalize else 'never'} divided by their sum."


def _example(name: str, kind: RouterKind) -> str:
    needed = combinations.example(name).settings
    own = [
        f"{field.name} = {_toml(getattr(needed, field.name))}"
        for field in dataclasses.fields(kind.settings or GroupConfig)
        if kind.settings is not None and field.name != "vocab_size"
    ]
    lines = []
    if kind.top_k is not None:
        lines.append(f"num_experts_per_tok = {kind.top_k}")
    if name == "dense":
        lines.append("num_experts_per_tok = 8   # num_experts")
    table = f"{{ {', '.join([f'name = {_toml(name)}', *own])} }}" if own else _toml(name)
    return "\n".join([*lines, f"router = {table}"])


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _options_table() -> str:
    """Every router and what it may be asked for; reasons below."""
    columns = {option: lambda name, option=option: combinations.option_refusal(name, option) for option in OPTIONS}
    return _matrix({name: name for name in ROUTER_KINDS}, columns)


def _balancers() -> Iterable[str]:
    yield "## Balancers"
    yield (
        "Any number at once, each with its coefficient or points over the steps: "
        '`balance_losses = [["switch", 0.01], ["router_z", [[0, 1e-3], [500, 0.0]]]]`. Each is computed layer by layer '
        "and averaged, never pooled over layers. Shares are of what routers chose, before any capacity; padding never "
        "counts."
    )
    rows = [
        [f"`{name}`", loss.scope, "1.0" if loss.evens else "as its equation"] for name, loss in BALANCE_LOSSES.items()
    ]
    yield _table(["balance loss", "scope", "perfect balance is"], rows)
    yield _SCOPES
    told: dict[Any, list[str]] = {}
    for name, loss in BALANCE_LOSSES.items():
        told.setdefault(loss.equation, []).append(name)
    for equation, names in told.items():
        yield f"### {', '.join(names)}"
        yield _text(equation)
    yield "### Moved once a step, without a gradient"
    yield "Selection biases, by `train.selection_bias_rate`, `selection_bias_rule` and `selection_bias_centered`:"
    yield _text(update_selection_bias)
    yield "The penalty of a `relu` router with the loss `relu_sparsity`:"
    yield _text(move_penalty)
    yield "### Which balance losses go with which routers"
    routers = combinations.examples()
    columns = {
        name: lambda label, name=name: combinations.loss_refusal(routers[label], name) for name in BALANCE_LOSSES
    }
    yield _matrix({label: router.name for label, router in routers.items()}, columns)


def _capacity() -> Iterable[str]:
    yield "## Capacity"
    yield _text(CapacityConfig)
    yield "Without a capacity nothing is dropped."
    yield _bullets(_described(field) for field in dataclasses.fields(CapacityConfig))
    yield "### Which capacities go with which routers"
    routers = combinations.examples()
    columns = {mode: lambda label, mode=mode: combinations.mode_refusal(routers[label], mode) for mode in CAPACITIES}
    yield _matrix({label: router.name for label, router in routers.items()}, columns)


def _matrix(rows: dict[str, str], columns: dict[str, Callable[[str], str | None]]) -> str:
    """A table of yes, or the number of the reason why not, and the reasons.

    rows: label -> router. columns: what it may be used with -> the reason why a label cannot, or None.
    """
    reasons: dict[str, int] = {}
    body = []
    for label, router in rows.items():
        found = [_general(column(label), router) for column in columns.values()]
        marks = ["yes" if why is None else f"({reasons.setdefault(why, len(reasons) + 1)})" for why in found]
        body.append([f"`{label}`", *marks])
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n\n".join([_table(["router", *(f"`{name}`" for name in columns)], body), "\n".join(notes)])


def _general(reason: str | None, router: str) -> str | None:
    """A refusal as it stands for all routers that it may be about, and for all balance losses."""
    if reason is None:
        return None
    reason = re.sub(rf"""router ["']{router}["'],""", "a router", reason)
    return re.sub(r'the balance loss "\w+" with a router', "a router", reason)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _described(field: dataclasses.Field[Any]) -> str:
    """A field, its default, and its values where they are few."""
    allowed = _allowed(field)
    if field.name == "vocab_size":
        return "`vocab_size`: left out, the model's"
    if field.default is None or field.default is dataclasses.MISSING:
        return f"`{field.name}`, {'which must be given' if field.default is not None else 'left out'}"
    return f"`{field.name} = {_toml(field.default)}`" + (f", of {allowed}" if allowed else "")


def _allowed(field: dataclasses.Field[Any]) -> str:
    kind = field.type if not isinstance(field.type, str) else None
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    return ""


def _fenced(module: ModuleType) -> str:
    """A module's docstring, in which an indented paragraph is a block of its own."""
    paragraphs = (module.__doc__ or "").strip().split("\n\n")
    return "\n\n".join(f"```\n{dedent(each)}\n```" if each.startswith(" ") else each for each in paragraphs)


def _text(thing: Any) -> str:
    """A docstring as paragraphs, without what it raises."""
    return re.sub(r"\s*Raises \w+Error[^.]*\.", "", inspect.cleandoc(thing.__doc__ or ""))


if __name__ == "__main__":
    sys.stdout.write(reference())
