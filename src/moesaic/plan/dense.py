"""Would a dense model do? The dense models that an MoE is fairly compared with, and the batch from which it is cheaper.

By active size (equal computation), by total size (equal memory), and of equal quality by a stated rule.
"""

import math
from dataclasses import replace
from typing import Literal, NamedTuple

from moesaic.checks import require
from moesaic.config import MlpConfig, ModelConfig, MoeConfig
from moesaic.plan.formats import Formats
from moesaic.plan.hardware import Device
from moesaic.plan.layout import Layout
from moesaic.plan.roofline import decode_step, step_time
from moesaic.plan.routing import Routing

Equal = Literal["active", "quality", "total"]
BATCHES = tuple(2**power for power in range(15))
NEAR = 1.02
"""Where a step takes no longer than this times the dense model's it counts as equal: at large batches an MoE and its
twin of equal active size compute the same, and the router comes on top."""


def quality_parameters(config: ModelConfig) -> float:
    """Parameters of a dense model that is about as good: the geometric mean of total and active ones.

    A rule of thumb that lies between the two sizes [M]; it gives 24B for Mixtral 8x7B, whose makers compare it with 70B
    of an older recipe. Give a size of your own where you know better.
    """
    return math.sqrt(float(config.total) * config.active_all)


def dense_model(config: ModelConfig, parameters: float) -> ModelConfig:
    """The same model with dense blocks in place of experts, as wide as makes it so many parameters in all.

    Raises ConfigError where attention and vocabulary alone are more.
    """
    size, layers = config.hidden_size, config.decoder.layers
    blocks = [layer.feed_forward for layer in layers if isinstance(layer.feed_forward, MoeConfig)]
    require(bool(blocks), f"this {config.family} model is dense; give one with experts")
    rest = config.total - sum(spec.numel for block in blocks for spec in block.tensors("", size))
    matrices = 3 if blocks[0].gated else 2
    inner = round((parameters - rest) / (len(blocks) * matrices * size))
    require(
        inner > 0,
        f"{parameters:,.0f} parameters are fewer than the {rest:,} outside of the experts; give more of them",
    )
    block = MlpConfig(intermediate_size=inner, activation=blocks[0].activation, gated=blocks[0].gated)
    dense = tuple(
        replace(layer, feed_forward=block) if isinstance(layer.feed_forward, MoeConfig) else layer for layer in layers
    )
    return replace(config, decoder=replace(config.decoder, layers=dense), mtp=())


def dense_equals(config: ModelConfig, quality: float | None = None) -> dict[Equal, ModelConfig]:
    """The dense models of equal active size, equal quality (of this many parameters, or by the rule), equal total."""
    sizes: dict[Equal, float] = {
        "active": config.active_all,
        "quality": quality or quality_parameters(config),
        "total": config.total,
    }
    return {name: dense_model(config, size) for name, size in sizes.items()}


class Crossover(NamedTuple):
    """Where an MoE's step is no longer than a dense model's: up to a batch, and from a batch on; None: nowhere.

    ratios: of the MoE's time to the dense model's, at each batch of BATCHES. Below 1 the MoE is faster.
    """

    dense_parameters: int
    up_to: int | None
    from_on: int | None
    ratios: tuple[float, ...]

    @property
    def in_words(self) -> str:
        if min(self.ratios) > NEAR:
            return "never as fast"
        if max(self.ratios) <= NEAR:
            return "as fast or faster at every batch"
        parts = [f"up to {self.up_to}"] if self.up_to else []
        parts += [f"from {self.from_on:,} on"] if self.from_on else []
        return f"as fast or faster {' and '.join(parts)}" if parts else "faster only in between"


def crossover(
    config: ModelConfig,
    dense: ModelConfig,
    formats: Formats,
    device: Device,
    context: float,
    layout: Layout | None = None,
    routing: Routing | None = None,
) -> Crossover:
    """Steps of the MoE and of a dense model on the same devices, at growing batches. Memory is not looked at here."""
    layout = layout or Layout()
    split = Layout(tp=layout.tp, dp=layout.dp, pp=layout.pp)
    ratios = []
    for batch in BATCHES:
        step = decode_step(batch * layout.dp, context)
        own = step_time(config, formats, step, device, layout, routing).seconds
        ratios.append(own / step_time(dense, formats, step, device, split).seconds)
    return Crossover(dense.total, _up_to(ratios), _from_on(ratios), tuple(ratios))


def _up_to(ratios: list[float]) -> int | None:
    """The last batch of those at the beginning where the MoE is as fast."""
    count = next((number for number, ratio in enumerate(ratios) if ratio > NEAR), len(ratios))
    return BATCHES[count - 1] if count else None


def _from_on(ratios: list[float]) -> int | None:
    """The first batch from which on it stays as fast."""
    count = next((number for number, ratio in enumerate(reversed(ratios)) if ratio > NEAR), len(ratios))
    return BATCHES[-count] if count else None
