"""What keeps experts even beside the losses: selection biases and a ReLU router's penalty, moved once a step."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from moesaic.config.router import ReluSettings
from moesaic.errors import NonFiniteError
from moesaic.layers.moe import MoeLayer
from moesaic.models.build import Model
from moesaic.routing.balancers import BALANCE_LOSSES, move_penalty, update_selection_bias
from moesaic.train.counts import StepCounts
from moesaic.train.loss import penalties
from moesaic.train.recipe import TrainSettings


def move_balance(model: Model, settings: TrainSettings, counts: StepCounts, rate: float) -> None:
    """Move selection biases by `rate`, and penalties that a loss multiplies, by what the whole step chose."""
    adapts = any(BALANCE_LOSSES[name].own_coefficient for name, _ in settings.balance_losses)
    own = penalties(model) if adapts else {}
    for layer in model.modules():
        if not isinstance(layer, MoeLayer) or layer.layer not in counts.so_far:  # some did not take part
            continue
        counts_E, router = counts.so_far[layer.layer], layer.router
        if router.selection_bias is not None:
            update_selection_bias(
                router.selection_bias,
                counts_E,
                rate,
                rule=settings.selection_bias_rule,
                centered=settings.selection_bias_centered,
            )
        if layer.layer in own and isinstance(router.config.settings, ReluSettings):
            num_tokens = counts.num_tokens[layer.layer]
            move_penalty(own[layer.layer], counts_E, num_tokens, router.config.top_k, router.config.settings)


def running_statistics(model: Model) -> list[Tensor]:
    """The running means and variances of routers whose logits are normalised; the very buffers."""
    routers = [layer.router for layer in model.modules() if isinstance(layer, MoeLayer)]
    found = [buffer for router in routers for buffer in (router.running_mean, router.running_var)]
    return [buffer for buffer in found if buffer is not None]


@contextmanager
def statistics_kept_on_failure(model: Model) -> Iterator[None]:
    """Puts running statistics back when the block raises NonFiniteError: they move in forward passes."""
    statistics = running_statistics(model)
    before = [buffer.clone() for buffer in statistics]
    try:
        yield
    except NonFiniteError:
        for buffer, old in zip(statistics, before, strict=True):
            buffer.copy_(old)
        raise


def with_own(coefficients: dict[str, float], model: Model) -> dict[str, float]:
    """Coefficients, times the mean of the layers' own where a loss has these."""
    own = [float(penalty) for penalty in penalties(model).values()]
    return {
        name: value * sum(own) / len(own) if BALANCE_LOSSES[name].own_coefficient else value
        for name, value in coefficients.items()
    }
