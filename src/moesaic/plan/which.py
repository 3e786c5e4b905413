"""Which model? Those that a machine serves to so many users, the best first; or what is missing for the smallest."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.errors import ConfigError
from moesaic.families import _counted
from moesaic.plan.cost import dollars_per_million
from moesaic.plan.dense import quality_parameters
from moesaic.plan.formats import as_released, named, total_bytes
from moesaic.plan.hardware import Machine
from moesaic.plan.kinds import with_shared_layers
from moesaic.plan.serving import Serving, make_serving
from moesaic.plan.verdict import smallest_count

FORMATS = ("int8", "int4")
"""Besides that in which a model was released."""
LEAST_RATE = 10.0
"""Tokens a second that a user is to get: as fast as one reads aloud, with something to spare."""


class Choice(NamedTuple):
    """A model in a format on the machine. size: parameters of a dense model about as good (see dense.py).

    rate: tokens a second of one user; dollars: of a million written tokens.
    """

    model: str
    format: str
    layout: str
    size: float
    memory_share: float
    most_users: int
    rate: float
    dollars: float | None


def which(
    machine: Machine, *, users: int, context: int, least_rate: float = LEAST_RATE, formats: Sequence[str] | None = None
) -> list[Choice]:
    """Every preset that fits and is fast enough, in the first of these formats that does, the largest first.

    formats: None: as it was released, then FORMATS. Raises ConfigError where there is none, saying what the smallest
    model would need.
    """
    found, models = [], _models(context)
    for name, config in models.items():
        for format_ in formats or dict.fromkeys((as_released(config.family), *FORMATS)):
            choice = _choice(name, config, format_, machine, users, context, least_rate)
            if choice is not None:
                found.append(choice)
                break
    if not found:
        raise ConfigError(_missing(models, machine, users, context, least_rate))
    return sorted(found, key=lambda choice: -choice.size)


def _models(context: int) -> dict[str, ModelConfig]:
    """Presets that write on, with so long a context; of several that are alike the first."""
    seen: dict[ModelConfig, str] = {}
    described = {name: _counted.count(preset.config) for name, preset in _counted.PRESETS.items()}
    for name, config in ({name: families.find_preset(name) for name in families.presets()} | described).items():
        if config.encoder is None and config.context_length >= context:
            seen.setdefault(config, name)
    return {name: with_shared_layers(config) for config, name in seen.items()}


def _choice(
    name: str, config: ModelConfig, format_: str, machine: Machine, users: int, context: int, least_rate: float
) -> Choice | None:
    formats = named(format_)
    if total_bytes(config, formats) > machine.memory_bytes:
        return None
    try:
        serving = make_serving(config, formats, machine, context=context, users=users)
    except ConfigError:  # no layout divides it
        return None
    memory = serving.memory
    if not memory.fits:
        return None
    rate = serving.tokens_per_second()
    if rate / users < least_rate:
        return None
    dollars = None if machine.price is None else dollars_per_million(machine.price, rate)
    size = quality_parameters(config) if config.moe_layers else float(config.total)
    share = memory.total / memory.capacity
    return Choice(name, format_, str(serving.layout), size, share, serving.most_users, rate / users, dollars)


def _missing(models: dict[str, ModelConfig], machine: Machine, users: int, context: int, least_rate: float) -> str:
    """Why nothing fits, and what would: of the smallest model in the narrowest format."""
    if not models:
        return f"no preset takes a context of {context:,} tokens; ask for a shorter one"
    name, config = min(models.items(), key=lambda item: item[1].total)
    alone = _narrowest(config, machine, users, context)
    count = smallest_count(alone)
    whole = f"no preset serves {users} users of {context:,} tokens on {machine.name} at {least_rate:g} tokens/s each"
    if count is None:
        return f"{whole}; the smallest, {name}, fits on no number of them: ask for fewer users or a shorter context"
    if count > machine.count:
        return f"{whole}; the smallest, {name} in {FORMATS[-1]}, needs {count}x{machine.device.name}"
    rate = alone.tokens_per_second() / users
    return f"{whole}; the smallest, {name} in {FORMATS[-1]}, gives {rate:.1f}: ask for less, or for fewer users"


def _narrowest(config: ModelConfig, machine: Machine, users: int, context: int) -> Serving:
    """In the narrowest format, wherever it fits."""
    return make_serving(config, named(FORMATS[-1]), replace(machine), context=context, users=users)
