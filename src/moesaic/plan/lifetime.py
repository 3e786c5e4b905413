"""What a model costs over its whole life, training and serving, and when that pays beside APIs and dense models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moesaic.checks import require
from moesaic.config import ModelConfig
from moesaic.errors import ConfigError
from moesaic.plan.cost import MILLION, Price, TrainingCost, Workload, break_even_tokens, lifetime_dollars, serving_cost
from moesaic.plan.dense import dense_equals
from moesaic.plan.hardware import Machine
from moesaic.plan.memory import Training
from moesaic.plan.serving import Serving, make_serving
from moesaic.plan.training import make_training

YEARS = 3.0
"""For which the workload goes on, where nobody says how many tokens are served."""
SEQUENCE = 4096


class Other(NamedTuple):
    """What else would write the same tokens: dollars to train it, dollars a million output tokens with what is read for
    them, dollars in all.

    ours_from, ours_until: output tokens in between which ours is the cheaper; from None: never, until None: for ever.
    """

    name: str
    training: float
    per_million: float
    total: float
    ours_from: float | None
    ours_until: float | None


@dataclass(frozen=True, kw_only=True)
class Lifetime:
    """Of a model that is trained on a machine and then serves a workload until it has written so many tokens.

    per_million: dollars a million output tokens, with reading, reasoning and retries. months: that takes.
    """

    training: TrainingCost
    training_machine: str
    served: float
    months: float
    per_million: float
    total: float
    others: tuple[Other, ...]


def lifetime(
    serving: Serving,
    *,
    tokens: float,
    workload: Workload,
    utilisation: float,
    machine: Machine | None = None,
    served: float | None = None,
    prices: Sequence[Price] = (),
    quality: float | None = None,
) -> Lifetime:
    """Training on `tokens`, then serving. machine: that it is trained on (None: the one that serves). served: output
    tokens (None: the workload's in three years).

    Raises ConfigError where a machine has no price, or nothing is served.
    """
    machine = machine or serving.machine
    for each in (machine, serving.machine):
        if each.device.price is None:
            raise ConfigError(f"nobody states what {each.name} costs; give --price '2.5 $/h', or another machine")
    require(workload.monthly_output > 0, "a workload without output tokens has no cost of a token; give some")
    served = YEARS * 12 * workload.monthly_output if served is None else served
    trained = _trained(serving.config, machine, tokens)
    own = _per_million(serving, workload, utilisation)
    assert trained.dollars is not None, "the machine has a price"
    rivals = [(price.name, 0.0, price.month(workload) / workload.monthly_output * MILLION) for price in prices]
    rivals += _dense(serving, machine, tokens, workload, utilisation, quality)
    return Lifetime(
        training=trained,
        training_machine=machine.name,
        served=served,
        months=served / workload.monthly_output,
        per_million=own,
        total=lifetime_dollars(trained.dollars, own, served),
        others=tuple(
            Other(
                name,
                training,
                per_million,
                lifetime_dollars(training, per_million, served),
                *_between(trained.dollars - training, own, per_million),
            )
            for name, training, per_million in rivals
        ),
    )


def _between(more_training: float, own: float, other: float) -> tuple[float | None, float | None]:
    """Tokens from and until which what costs so much more to train, and `own` a million, is the cheaper in all."""
    if more_training > 0:
        return break_even_tokens(more_training, own, other), None
    return 0.0, break_even_tokens(-more_training, other, own)


def _trained(config: ModelConfig, machine: Machine, tokens: float) -> TrainingCost:
    """By the best of the usual layouts; numbers of bf16."""
    length = min(SEQUENCE, config.context_length)
    return make_training(config, machine, Training(), sequence_length=length).cost(tokens)


def _per_million(serving: Serving, workload: Workload, utilisation: float) -> float:
    month = serving_cost(serving.rates(), workload, utilisation).month
    assert month is not None, "the machine has a price"
    return month / workload.monthly_output * MILLION


def _dense(
    serving: Serving, machine: Machine, tokens: float, workload: Workload, utilisation: float, quality: float | None
) -> list[tuple[str, float, float]]:
    """Dense models of equal active size and of equal quality, trained on as many tokens: name, dollars to train,
    dollars a million tokens. None for a dense model."""
    if not serving.config.moe_layers or serving.config.encoder is not None:
        return []
    found = []
    for equal, config in dense_equals(serving.config, quality).items():
        if equal == "total":
            continue  # nobody would
        other = make_serving(
            config,
            serving.formats,
            serving.machine,
            context=serving.context,
            users=serving.users,
            speculation=serving.speculation,
            overlap=serving.overlap,
        )
        trained = _trained(config, machine, tokens)
        assert trained.dollars is not None, "the machine has a price"
        name = "dense, equal active size" if equal == "active" else "dense, about equal quality"
        found.append((name, trained.dollars, _per_million(other, workload, utilisation)))
    return found
