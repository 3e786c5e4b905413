"""What a model takes of memory, device by device: weights, cache, activations; for training also all that learns.

L layers, D hidden, E experts, K chosen, F their inner width, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moesaic.checks import require
from moesaic.config import (
    AbsentConfig,
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    RecurrentConfig,
    SoftMoeConfig,
)
from moesaic.plan.flops import cache_split
from moesaic.plan.formats import Formats, layer_state_bytes
from moesaic.plan.hardware import Device
from moesaic.plan.kinds import layer_kinds, layer_specs
from moesaic.plan.layout import Layout
from moesaic.plan.routing import crowding
from moesaic.tensor_spec import TensorSpec

RUNTIME_BYTES = {"gpu": 1.5 * 2**30, "tpu": 0.5 * 2**30, "mac": 0.5 * 2**30, "cpu": 0.25 * 2**30}
"""What a device's programs and libraries take before any weight: kernels' code, context, buffers for sending [M]."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes by what they are for, of the fullest device."""

    parts: dict[str, float]
    capacity: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def free(self) -> float:
        """What is left; below 0 where it does not fit."""
        return self.capacity - self.total

    @property
    def fits(self) -> bool:
        return self.free >= 0


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is kept of a parameter, in bytes, and what of a step.

    weights: what forward and backward multiply; master: a wide copy, 0 where weights are wide; moments: of the
    optimizer; gradient. zero: 0: every copy keeps all; 1: moments and masters are split over copies, 2: gradients, too,
    3: weights, too (ZeRO, arXiv:1910.02054). recompute: "none", "layers" (of each layer only its input stays) or
    "experts" (what experts make inside is made again). tokens: of a micro-batch on one device. in_flight: micro-batches
    whose activations wait at once; None: as many as there are stages (1F1B).
    """

    weights: float = 2.0
    master: float = 4.0
    moments: float = 8.0
    gradient: float = 4.0
    zero: Literal[0, 1, 2, 3] = 1
    recompute: Literal["none", "experts", "layers"] = "none"
    tokens: int = 4096
    in_flight: int | None = None
    element_bytes: float = 2.0

    def __post_init__(self) -> None:
        require(self.zero in (0, 1, 2, 3), f"zero={self.zero}; use 0, 1, 2 or 3")
        known = ("none", "experts", "layers")
        require(self.recompute in known, f"recompute={self.recompute!r}; known: {', '.join(known)}")
        require(self.tokens > 0, f"tokens={self.tokens} of a micro-batch; use 1 or more")

    def bytes_per_parameter(self, copies: int) -> dict[str, float]:
        """Of a parameter of which there are `copies` on as many devices."""
        split = [copies if self.zero >= level else 1 for level in (1, 2, 3)]
        return {
            "weights": self.weights / split[2],
            "gradients": self.gradient / split[1],
            "optimizer": (self.master + self.moments) / split[0],
        }


def stage_layers(config: ModelConfig, pp: int) -> list[Sequence[LayerConfig]]:
    """The layers of each pipeline stage: as many each, the first stages one more where they do not divide."""
    layers, stages, start = config.layers, [], 0
    for stage in range(pp):
        size = len(layers) // pp + (stage < len(layers) % pp)
        stages.append(layers[start : start + size])
        start += size
    return stages


def share_held(spec: TensorSpec, layer: LayerConfig | None, layout: Layout) -> float:
    """The part of a tensor that one device holds: matrices split by TP, experts by EP, vectors and routers whole."""
    if spec.role == "experts" and layer is not None:
        if isinstance(layer.feed_forward, MoeConfig):
            slots = layer.feed_forward.num_experts + layout.redundant
            return slots / layout.ep / layer.feed_forward.num_experts / layout.etp
        return 1 / layout.tp
    if len(spec.shape) == 1 or spec.role in ("router", "norm", "residual"):
        return 1.0
    return 1 / layout.tp


def device_weights(config: ModelConfig, formats: Formats, layout: Layout, *, mtp: bool = False) -> dict[str, float]:
    """Bytes of weights by role on the fullest device, the stage with the most of them."""
    return max(stage_weights(config, formats, layout, mtp=mtp), key=lambda parts: sum(parts.values()))


def stage_weights(
    config: ModelConfig, formats: Formats, layout: Layout, *, mtp: bool = False
) -> list[dict[str, float]]:
    """Bytes of weights by role on a device of each pipeline stage.

    mtp: the layers that predict further tokens stand on the last stage.
    """
    stages = stage_layers(config, layout.pp)
    found = []
    for number, layers in enumerate(stages):
        parts: dict[str, float] = {}
        for layer, _, count in layer_kinds(layers):
            _add(parts, layer_specs(layer, config.hidden_size), layer, formats, layout, count)
        _add(parts, end_specs(config, number == 0, number == len(stages) - 1), None, formats, layout)
        if number == len(stages) - 1 and mtp:
            for layer in config.mtp:
                _add(parts, layer_specs(layer, config.hidden_size), layer, formats, layout)
        found.append(parts)
    return found


def end_specs(config: ModelConfig, first: bool, last: bool) -> list[TensorSpec]:
    """What stands before the first layer and after the last one: tables and norms. A tied table is on both stages."""
    table = (config.vocab_size, config.hidden_size)
    found = []
    if first or (last and config.tie_word_embeddings):
        found.append(TensorSpec("embedding.weight", table, "embedding"))
    if last:
        found += config.decoder.end_tensors("", config.hidden_size)
        found += config.encoder.end_tensors("encoder_", config.hidden_size) if config.encoder else ()
        found += [] if config.tie_word_embeddings else [TensorSpec("head.weight", table, "head")]
        found += [TensorSpec("head.bias", table[:1], "head")] if config.head_bias else []
    return found


def _add(
    parts: dict[str, float],
    specs: Sequence[TensorSpec],
    layer: LayerConfig | None,
    formats: Formats,
    layout: Layout,
    count: int = 1,
) -> None:
    for spec in specs:
        size = formats.tensor_bytes(spec) * share_held(spec, layer, layout) * count
        parts[spec.role] = parts.get(spec.role, 0.0) + size


def cache_bytes(config: ModelConfig, formats: Formats, context: float, texts: float, layout: Layout) -> float:
    """The cache of `texts` texts of `context` tokens on the fullest device: its copy's texts, its stage's layers."""
    return max(stage_caches(config, formats, context, texts, layout))


def stage_caches(config: ModelConfig, formats: Formats, context: float, texts: float, layout: Layout) -> list[float]:
    """The same of a device of each stage; with an encoder, of all stages as of the decoder's."""
    own = texts / layout.dp
    stages = stage_layers(config, layout.pp) if config.encoder is None else [config.decoder.layers]
    return [
        own
        * sum(
            layer_state_bytes(attention, round(context), formats.cache) / cache_split(attention, layout.tp) * count
            for layer, _, count in layer_kinds(layers)
            for attention in (layer.attention, layer.cross_attention)
            if attention is not None
        )
        for layers in stages
    ]


def workspace_bytes(config: ModelConfig, formats: Formats, tokens: float, outputs: float, layout: Layout) -> float:
    """What a step of so many tokens of one device works in: the residual, the widest layer's inner rows, logits.

    Buffers are used again layer after layer, so only the widest counts. Rows of experts are those of the busiest rank.
    """
    del formats  # rows are kept in 16 bits, logits in 32, whatever the weights are
    size = config.hidden_size
    widest = max(_layer_rows(kind.layer, size, tokens, layout) for kind in layer_kinds(config.layers))
    return 2.0 * (3 * tokens * size + widest) + 4.0 * outputs * config.vocab_size / layout.tp


def _layer_rows(layer: LayerConfig, size: int, tokens: float, layout: Layout) -> float:
    """Numbers that the wider of attention and feed-forward keeps of a step's tokens at once."""
    attention = layer.attention
    heads = attention.num_heads / layout.tp
    if isinstance(attention, AbsentConfig):
        inside = 0.0
    elif isinstance(attention, AttentionConfig):
        inside = (2 * heads + 2 * attention.num_key_value_heads / layout.tp) * attention.head_dim
    elif isinstance(attention, RecurrentConfig):
        inside = recurrent_rows(attention, layout)
    else:
        inside = 3 * heads * attention.head_dim
    return max(tokens * inside, feed_forward_rows(layer.feed_forward, size, tokens, layout))


def recurrent_rows(attention: RecurrentConfig, layout: Layout) -> float:
    """Numbers of a token inside of a recurrent part: what is projected, what comes out of it, and that once gated."""
    projected = next(shape[0] for _, shape, _ in attention.weights)  # the first makes all that the others read
    return (projected + 2 * attention.num_heads * attention.head_dim) / layout.tp


def feed_forward_rows(
    block: MlpConfig | MoeConfig | SoftMoeConfig | AbsentConfig, size: int, tokens: float, layout: Layout
) -> float:
    """Numbers of a feed-forward part's rows: gate, up and their product, and of experts what goes in and comes out."""
    if isinstance(block, AbsentConfig):
        return 0.0
    if isinstance(block, MlpConfig):
        return 3 * tokens * block.intermediate_size / layout.tp
    if isinstance(block, SoftMoeConfig):
        slots = block.num_experts * block.slots_per_expert
        return slots * (3 * block.intermediate_size + 2 * size) / layout.tp
    mean = tokens * layout.dp / layout.expert_copies * block.router.top_k / layout.ep
    rows = mean * crowding(mean, layout.ep)
    shared = 3 * tokens * block.shared.intermediate_size / layout.tp if block.shared else 0.0
    return rows * (3 * block.intermediate_size / layout.etp + 2 * size) + shared


def serving_memory(
    config: ModelConfig,
    formats: Formats,
    device: Device,
    layout: Layout | None = None,
    *,
    context: float,
    texts: float,
    step_tokens: float | None = None,
    mtp: bool = False,
) -> DeviceMemory:
    """The fullest device of a server that holds `texts` texts of `context` tokens.

    step_tokens: the most new tokens of a step on one device (prompts are cut into pieces); None: 8,192, or fewer where
    no text is as long, but one of each text at least.
    """
    layout = layout or Layout()
    own = texts / layout.dp
    tokens = max(own, min(8192.0, context * own)) if step_tokens is None else max(own, step_tokens)
    parts = {
        f"weights: {role}": size for role, size in device_weights(config, formats, layout, mtp=mtp).items() if size
    }
    parts["cache"] = cache_bytes(config, formats, context, texts, layout)
    parts["workspace"] = workspace_bytes(config, formats, tokens, max(1.0, own), layout)
    parts["runtime"] = RUNTIME_BYTES[device.kind]
    return DeviceMemory(parts=parts, capacity=device.memory_bytes)


def stage_memories(
    config: ModelConfig,
    formats: Formats,
    layout: Layout,
    whole: DeviceMemory,
    *,
    context: float,
    texts: float,
    mtp: bool = False,
) -> list[DeviceMemory]:
    """A device of each pipeline stage of a server; whole: what serving_memory says of the same.

    What a step works in is reckoned alike for all stages.
    """
    weights = stage_weights(config, formats, layout, mtp=mtp)
    caches = stage_caches(config, formats, context, texts, layout)
    same = {name: whole.parts[name] for name in ("workspace", "runtime")}
    return [
        replace(
            whole, parts={f"weights: {role}": size for role, size in parts.items() if size} | {"cache": cache} | same
        )
        for parts, cache in zip(weights, caches * (len(weights) // len(caches)), strict=True)
    ]


def most_texts(
    config: ModelConfig, formats: Formats, device: Device, layout: Layout | None = None, *, context: float
) -> int:
    """The most texts of `context` tokens that fit at once; 0: not even one (of each copy of attention)."""
    layout = layout or Layout()

    def fits(each: int) -> bool:
        texts = each * layout.dp
        return serving_memory(config, formats, device, layout, context=context, texts=texts).fits

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * layout.dp


def training_memory(
    config: ModelConfig, training: Training, device: Device, layout: Layout | None = None
) -> DeviceMemory:
    """The fullest device of a training run."""
    return max(
        training_stages(config, training, device, layout or Layout()), key=lambda stage: sum(stage.parts.values())
    )


def training_stages(config: ModelConfig, training: Training, device: Device, layout: Layout) -> list[DeviceMemory]:
    """A device of each pipeline stage of a training run: parameters and what is kept beside each, and activations of
    the micro-batches that wait there (1F1B: as many as there are stages from it to the last), logits on the last.

    Copies of experts are fewer than copies of the rest (their data parallelism is what EP leaves over), so ZeRO splits
    them less.
    """
    of_experts = training.bytes_per_parameter(layout.expert_copies)
    of_others = training.bytes_per_parameter(layout.dp)
    activations = stage_activations(config, training, layout)
    found = []
    for number, (dense, experts) in enumerate(_held_parameters(config, layout)):
        names = ("weights", "gradients", "optimizer")
        parts = {name: dense * of_others[name] + experts * of_experts[name] for name in names}
        parts["activations"] = activations[number]
        if number == layout.pp - 1:
            parts["logits"] = training.tokens * config.vocab_size * (4.0 + training.element_bytes) / layout.tp
        parts["runtime"] = RUNTIME_BYTES[device.kind]
        found.append(DeviceMemory(parts=parts, capacity=device.memory_bytes))
    return found


def _held_parameters(config: ModelConfig, layout: Layout) -> list[tuple[float, float]]:
    """Parameters of each stage on one device: those that are copied, and routed experts."""
    found = []
    stages = stage_layers(config, layout.pp)
    for number, layers in enumerate(stages):
        dense, experts = 0.0, 0.0
        for layer, _, count in layer_kinds(layers):
            for spec in layer_specs(layer, config.hidden_size):
                held = spec.numel * share_held(spec, layer, layout) * spec.is_parameter * count
                dense, experts = (dense, experts + held) if spec.role == "experts" else (dense + held, experts)
        ends = end_specs(config, number == 0, number == len(stages) - 1)
        dense += sum(spec.numel * share_held(spec, None, layout) for spec in ends)
        found.append((dense, experts))
    return found


def stage_activations(config: ModelConfig, training: Training, layout: Layout) -> list[float]:
    """What the backward pass needs of a forward pass, of all micro-batches that wait on each stage.

    Per token and layer: the input of each norm and projection, queries, keys, values and what attention gives, gate, up
    and their product, and for experts what was sent to them and came back (systems: arXiv:2205.05198, eq. 2, for
    gated blocks and flash attention, which keeps no scores).
    """
    return [
        (training.in_flight or layout.pp - number)
        * training.element_bytes
        * sum(
            _kept_of_layer(kind.layer, config.hidden_size, training, layout) * kind.times for kind in layer_kinds(stage)
        )
        for number, stage in enumerate(stage_layers(config, layout.pp))
    ]


def _kept_of_layer(layer: LayerConfig, size: int, training: Training, layout: Layout) -> float:
    tokens = training.tokens
    if training.recompute == "layers":
        chosen = layer.feed_forward.router.top_k * 6 if isinstance(layer.feed_forward, MoeConfig) else 0
        return tokens * (size / layout.tp + chosen / training.element_bytes)
    attention = layer.attention
    heads = attention.num_heads / layout.tp
    if isinstance(attention, AbsentConfig):
        inside = 0.0
    elif isinstance(attention, AttentionConfig):
        inside = (2 * heads + 2 * attention.num_key_value_heads / layout.tp) * attention.head_dim
    elif isinstance(attention, RecurrentConfig):
        inside = recurrent_rows(attention, layout)
    else:
        inside = 4 * heads * attention.head_dim
    norms = 4 - 2 * isinstance(layer.attention, AbsentConfig) - 2 * isinstance(layer.feed_forward, AbsentConfig)
    kept = tokens * (inside + norms * size)  # both norms' inputs and outputs
    moe = layer.feed_forward
    if isinstance(moe, MoeConfig):
        kept += tokens * 2.0 * moe.num_experts  # logits of the router, in fp32
        if training.recompute == "experts":
            return kept + tokens * moe.router.top_k * size
    return kept + feed_forward_rows(moe, size, tokens, layout)
