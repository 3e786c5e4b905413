"""Feed-forward parts: a dense block, and experts with a router and perhaps a shared expert (see layers/moe.py)."""

import math

import torch
from torch import Tensor

from moesaic.config import ClampedSwiglu, MlpConfig, MoeConfig
from moesaic.config.activation import Activation
from moesaic.engine.builder import Builder, Label, Place, native_packed
from moesaic.engine.lower.router import lower_router


def lower_mlp(build: Builder, config: MlpConfig, name: str, label: Label, target: Place, multiplier: float) -> None:
    """target += multiplier * block(normed)."""
    bits, into_bias, down_bias = build.packer.precision.bits, None, None
    into = ["gate_proj", "up_proj"] if config.gated else ["up_proj"]
    packed = build.packer.matrix([f"{name}.{part}.weight" for part in into], bits, label.part, paired=config.gated)
    down = build.packer.matrix([f"{name}.down_proj.weight"], bits, label.part)
    if config.bias:
        into_bias = torch.cat([build.floats(f"{name}.{part}.bias") for part in into])[None]
        down_bias = build.floats(f"{name}.down_proj.bias")[None]
    build.native.feed_forward(
        label,
        build.normed,
        target,
        native_packed(packed),
        native_packed(down),
        into_bias,
        down_bias,
        _activation(config.activation),
        multiplier,
    )


def lower_moe(build: Builder, config: MoeConfig, name: str, layer: int, multiplier: float) -> None:
    """residual += multiplier * (routed experts + shared expert)."""
    lower_router(build, config.router, f"{name}.router", layer)
    _experts(build, config, f"{name}.experts", layer, multiplier * (1 - config.output_masking))
    if config.shared is None:
        return
    label = Label("shared experts", layer)
    if not config.shared_gate:
        lower_mlp(build, config.shared, f"{name}.shared_experts", label, build.residual, multiplier)
        return
    size = build.config.hidden_size
    own = build.buffer("shared expert", size)
    build.native.clear(label, own, size)
    lower_mlp(build, config.shared, f"{name}.shared_experts", label, own, 1.0)
    gate = native_packed(build.packer.exact(f"{name}.shared_gate.weight", label.part))
    build.native.add(label, own, build.residual, size, multiplier, gate, build.normed)


def _experts(build: Builder, config: MoeConfig, name: str, layer: int, multiplier: float) -> None:
    bits, count = build.packer.precision.of_experts, config.num_experts
    into = "gate_up" if config.gated else "up"
    biases: list[Tensor | None] = [None, None]
    if config.bias:
        biases = [build.floats(f"{name}.{into}_bias"), build.floats(f"{name}.down_bias")]
    build.native.experts(
        Label("experts", layer),
        build.normed,
        build.residual,
        native_packed(build.packer.experts(f"{name}.{into}", count, bits, paired=config.gated)),
        native_packed(build.packer.experts(f"{name}.down", count, bits, paired=False)),
        *biases,
        _activation(config.activation),
        multiplier,
        config.router.name == "sigmoid_input",
    )


def _activation(activation: Activation) -> tuple[str, float, float, float]:
    """Name, limit, alpha and shift, as native steps take them."""
    if isinstance(activation, ClampedSwiglu):
        return ("silu", activation.limit, activation.alpha, activation.shift)
    return (activation, math.inf, 1.0, 0.0)
