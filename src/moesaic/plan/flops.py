"""What one step of a model must read and compute on each device, operation by operation.

T new tokens of B texts, D hidden, E experts, K chosen, F their inner width. All figures are of one device: the busiest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moesaic.config import (
    AbsentConfig,
    AttentionConfig,
    CompressedAttentionConfig,
    LayerConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    OutlinedMoe,
    RecurrentConfig,
    SoftMoeConfig,
)
from moesaic.config.indexer import IndexerConfig
from moesaic.plan.formats import CACHE_BYTES, Formats, layer_state_bytes
from moesaic.plan.hardware import Number
from moesaic.plan.kinds import layer_kinds, part_specs
from moesaic.plan.layout import Layout
from moesaic.plan.routing import Routing, Uniform
from moesaic.tensor_spec import TensorSpec

Kind = Literal["decode", "prefill"]
Mixer = AttentionConfig | MlaConfig | CompressedAttentionConfig | RecurrentConfig | AbsentConfig
"""What mixes tokens in a layer."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: `texts` of which each brings `new` tokens and sees up to `context` tokens, its new ones included.

    A decode step has new=1, or 1 and the drafts that it verifies; a prefill step brings a prompt, or a piece of it.
    Logits are wanted of all new tokens of a decode step, and of the last one of a prompt.
    """

    kind: Kind
    texts: float
    new: float
    context: float

    @property
    def tokens(self) -> float:
        return self.texts * self.new

    @property
    def seen(self) -> float:
        """Tokens that a new one sees on average."""
        return self.context - (self.new - 1) / 2

    @property
    def outputs(self) -> float:
        return self.tokens if self.kind == "decode" else self.texts


class Op(NamedTuple):
    """Operations of one name, of all layers that have them alike.

    weight_bytes, state_bytes (of the cache), row_bytes (what tokens bring and take along): read or written by one
    device. flops: multiplications and additions, two to a pair. number: what their products are made of. launches: of
    kernels.
    """

    name: str
    weight_bytes: float
    state_bytes: float
    row_bytes: float
    flops: float
    number: Number
    launches: float

    @property
    def num_bytes(self) -> float:
        return self.weight_bytes + self.state_bytes + self.row_bytes

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flops / self.num_bytes if self.num_bytes else 0.0


def step_ops(
    config: ModelConfig, formats: Formats, step: Step, layout: Layout | None = None, routing: Routing | None = None
) -> list[Op]:
    """Everything that a step of all pipeline stages together reads and computes, of the busiest device of each stage.

    Divide by `layout.pp` for one stage's share. Operations of equal layers are added up.
    """
    layout, routing = layout or Layout(), routing or Uniform()
    stage = _Stage(config, formats, step, layout, routing)
    found: dict[str, Op] = {}
    for op in stage.ops():
        found[op.name] = _plus(found[op.name], op) if op.name in found else op
    return list(found.values())


class _Stage(NamedTuple):
    """What the functions below share."""

    config: ModelConfig
    formats: Formats
    step: Step
    layout: Layout
    routing: Routing

    @property
    def own(self) -> Step:
        """The step of one copy of attention: its part of the texts."""
        return Step(
            kind=self.step.kind,
            texts=self.step.texts / self.layout.dp,
            new=self.step.new,
            context=self.step.context,
        )

    def ops(self) -> Iterator[Op]:
        size = self.config.hidden_size
        rows = self.own.tokens * size * 2.0
        yield Op("embedding", 0.0, 0.0, 2 * rows, 0.0, "bf16", 1)
        for layer, index, count in self._layers():
            for op in self._layer(layer, index):
                yield _times(op, count)
        yield self._head()

    def _layers(self) -> Iterator[tuple[LayerConfig, int, int]]:
        """Layers, their numbers, and how many there are of each: equal ones are alike only where all route alike.

        A prompt goes through an encoder, where there is one, and new tokens through the decoder.
        """
        config = self.config
        layers = config.encoder.layers if config.encoder and self.step.kind == "prefill" else config.decoder.layers
        first = 0 if layers is not config.decoder.layers else len(config.layers) - len(layers)
        if not isinstance(self.routing, Uniform):
            yield from ((layer, first + number, 1) for number, layer in enumerate(layers))
            return
        yield from ((layer, first + number, count) for layer, number, count in layer_kinds(layers))

    def _layer(self, layer: LayerConfig, index: int) -> Iterator[Op]:
        size = self.config.hidden_size
        own = self.own
        parts = sum(not isinstance(part, AbsentConfig) for part in (layer.attention, layer.feed_forward))
        norm = Op("norms", 0.0, 0.0, 4.0 * own.tokens * size, 4.0 * own.tokens * size, "fp32", 1)
        yield _times(norm, parts)
        if not isinstance(layer.attention, AbsentConfig):
            yield from self._attention(layer)
        yield from self._feed_forward(layer, index)

    def _attention(self, layer: LayerConfig) -> Iterator[Op]:
        size, own, attention = self.config.hidden_size, self.own, layer.attention
        specs = [spec for spec in part_specs(attention, size) if len(spec.shape) > 1]
        yield self._matrices("projections", specs, own.tokens, self.layout.tp, launches=3)
        yield attention_op(attention, self.formats, own, self.layout.tp)
        if layer.cross_attention is not None:
            specs = [spec for spec in part_specs(layer.cross_attention, size) if len(spec.shape) > 1]
            yield self._matrices("projections", specs, own.tokens, self.layout.tp, launches=2)
            yield attention_op(layer.cross_attention, self.formats, own, self.layout.tp)

    def _feed_forward(self, layer: LayerConfig, index: int) -> Iterator[Op]:
        size, own, feed_forward = self.config.hidden_size, self.own, layer.feed_forward
        if isinstance(feed_forward, MoeConfig):
            yield from self._moe(feed_forward, index)
        elif isinstance(feed_forward, SoftMoeConfig):
            flops = feed_forward.flops_per_token(size, round(max(1.0, own.new))) * own.tokens
            held = sum(map(self.formats.tensor_bytes, part_specs(feed_forward, size)))
            yield Op("experts", held, 0.0, 0.0, flops, self.formats.of("experts").products, 3)
        elif not isinstance(feed_forward, AbsentConfig):
            yield self._matrices("mlp", list(part_specs(feed_forward, size)), own.tokens, self.layout.tp, launches=2)

    def _moe(self, moe: MoeConfig, index: int) -> Iterator[Op]:
        size, tokens = self.config.hidden_size, self.own.tokens
        specs = list(part_specs(moe, size))
        router = [spec for spec in specs if spec.role == "router" and len(spec.shape) > 1 and spec.is_parameter]
        yield self._matrices("router", router, tokens, 1, launches=2)
        shared = [spec for spec in specs if spec.role == "shared_experts"]
        if shared:
            yield self._matrices("shared experts", shared, tokens, self.layout.tp, launches=2)
        yield expert_op(self, moe, index)

    def _matrices(self, name: str, specs: Sequence[TensorSpec], tokens: float, split: int, *, launches: float) -> Op:
        """Dense products of all tokens with matrices that are split over `split` devices."""
        held = sum(map(self.formats.tensor_bytes, specs)) / split
        numel = sum(spec.numel for spec in specs) / split
        rows = sum(sum(spec.shape[-2:]) for spec in specs if len(spec.shape) > 1) * tokens * 2.0 / split
        number = self.formats.of(specs[0].role).products if specs else "bf16"
        return Op(name, held, 0.0, rows, 2.0 * numel * tokens, number, launches)

    def _head(self) -> Op:
        config, own = self.config, self.own
        numel = config.vocab_size * config.hidden_size / self.layout.tp
        packing = self.formats.of("head")
        rows = own.outputs * (config.hidden_size * 2.0 + config.vocab_size * 4.0 / self.layout.tp)
        return Op("head", numel * packing.bits / 8, 0.0, rows, 2.0 * numel * own.outputs, packing.products, 2)


def expert_op(stage: _Stage, moe: MoeConfig, index: int) -> Op:
    """Routed experts of one layer on the busiest rank: the experts that are hit, and the rows that fall on them."""
    layout, size = stage.layout, stage.config.hidden_size
    tokens = stage.step.tokens / layout.expert_copies
    hit = stage.routing.distinct(moe, index, tokens)
    crowded = stage.routing.imbalance(moe, index, layout.ep, tokens)
    of_one = sum(map(stage.formats.tensor_bytes, _experts(moe, size))) / moe.num_experts / layout.etp
    numel = sum(spec.numel for spec in _experts(moe, size)) / moe.num_experts / layout.etp
    # The busiest rank has more rows, and so more of its experts are hit, but never more than it holds.
    held = (moe.num_experts + layout.redundant) / layout.ep
    on_rank = min(held, hit / layout.ep * (crowded if hit < moe.num_experts else 1.0))
    rows = tokens * moe.router.top_k / layout.ep * crowded
    width = (moe.expert_size if isinstance(moe, OutlinedMoe) else None) or size
    moved = rows * (2 * width + 3 * moe.intermediate_size / layout.etp) * 2.0
    flops = 2.0 * numel * rows
    return Op("experts", on_rank * of_one, 0.0, moved, flops, stage.formats.of("experts").products, 4)


def _experts(moe: MoeConfig, size: int) -> list[TensorSpec]:
    return [spec for spec in part_specs(moe, size) if spec.role == "experts"]


def attention_op(attention: Mixer, formats: Formats, own: Step, tp: int) -> Op:
    """Scores and weighted values of one layer. Latent attention decodes over latents, without expanding them.

    The cache of grouped keys is split over `tp` devices as far as there are groups; latents are on every one.
    """
    if own.kind == "decode":
        read = own.texts * read_state_bytes(attention, own.context, formats.cache) / cache_split(attention, tp)
        flops = own.tokens * decode_score_flops(attention, own.seen) / tp
        return Op("attention", 0.0, read, 0.0, flops, "bf16", 2)
    kept = own.texts * layer_state_bytes(attention, round(own.context), formats.cache) / cache_split(attention, tp)
    flops = own.tokens * attention.score_flops(round(own.seen)) / tp
    return Op("attention", 0.0, kept, 0.0, flops, "bf16", 2)


def cache_split(attention: Mixer, tp: int) -> int:
    """Over how many of `tp` devices a layer's cache is split: one vector that all heads share is on each of them."""
    if isinstance(attention, RecurrentConfig):
        return min(tp, attention.num_heads)
    return min(tp, attention.num_key_value_heads) if isinstance(attention, AttentionConfig) else 1


def decode_score_flops(attention: Mixer, context: float) -> float:
    """FLOPs of a new token's scores and values; of latents as they are kept (DeepSeek-V2, sec. 2.1.2)."""
    if not isinstance(attention, MlaConfig):
        return attention.score_flops(round(context))
    attending = 2.0 * attention.num_heads * (2 * attention.latent_rank + attention.rope_dim)
    if not isinstance(attention.indexer, IndexerConfig):
        return attending * context
    choosing = 2.0 * attention.indexer.num_heads * (attention.indexer.head_dim + 1)
    return attending * min(context, attention.indexer.top_k) + choosing * context


def read_state_bytes(attention: Mixer, context: float, cache: str) -> float:
    """Of what a layer keeps of one text, what a new token reads: chosen tokens or entries only, and what chooses."""
    element, tokens = CACHE_BYTES[cache], round(context)
    if isinstance(attention, MlaConfig) and isinstance(attention.indexer, IndexerConfig):
        index = float(attention.indexer.head_dim * tokens) * element
        whole = layer_state_bytes(attention, tokens, cache) - index
        return index + whole * min(1.0, attention.indexer.top_k / max(1, tokens))
    if isinstance(attention, CompressedAttentionConfig):
        window = min(tokens, attention.window) * attention.head_dim
        if attention.compression is None:
            return window * element
        entries = tokens // attention.compression.ratio
        if attention.indexer is None:
            return (window + entries * attention.head_dim) * element
        chosen = min(entries, attention.indexer.top_k)
        return (window + chosen * attention.head_dim + entries * attention.indexer.head_dim) * element
    if isinstance(attention, RecurrentConfig):
        return 2.0 * attention.state().fixed_bytes  # read, and written again
    return layer_state_bytes(attention, tokens, cache)


def training_flops(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one trained token: three forward passes' worth (backward costs two); a token sees half its sequence."""
    return 3.0 * config.flops_per_token(sequence_length // 2)


def _times(op: Op, count: float) -> Op:
    return op._replace(
        weight_bytes=op.weight_bytes * count,
        state_bytes=op.state_bytes * count,
        row_bytes=op.row_bytes * count,
        flops=op.flops * count,
        launches=op.launches * count,
    )


def _plus(op: Op, other: Op) -> Op:
    return op._replace(
        weight_bytes=op.weight_bytes + other.weight_bytes,
        state_bytes=op.state_bytes + other.state_bytes,
        row_bytes=op.row_bytes + other.row_bytes,
        flops=op.flops + other.flops,
        launches=op.launches + other.launches,
    )
