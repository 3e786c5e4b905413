"""The whole model: layers of parts, stacks of layers, and what follows from them."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moesaic.checks import require, require_positive
from moesaic.config.activation import ClampedSwiglu
from moesaic.config.attention import AttentionConfig, StateSpec, TemperatureConfig
from moesaic.config.capacity import CapacityConfig
from moesaic.config.compressed import CompressedAttentionConfig, CompressionConfig, EntryIndexerConfig
from moesaic.config.feed_forward import MlpConfig, MoeConfig, SoftMoeConfig
from moesaic.config.hyper_connection import HyperConnectionConfig
from moesaic.config.indexer import IndexerConfig
from moesaic.config.mla import MlaConfig
from moesaic.config.norm import NormConfig
from moesaic.config.outline import AbsentConfig, OutlinedAttention, OutlinedMla, OutlinedMoe, RecurrentConfig
from moesaic.config.positions import RelativeBiasConfig, SinusoidConfig
from moesaic.config.rope import LinearConfig, Llama3Config, LongRopeConfig, RopeConfig, YarnConfig
from moesaic.config.router import (
    GroupConfig,
    HashSettings,
    NoisySettings,
    NullSettings,
    ReluSettings,
    RouterConfig,
    SinkhornSettings,
    SparseMixerSettings,
    Top2Settings,
    TopPSettings,
)
from moesaic.errors import ConfigError
from moesaic.tensor_spec import ROLES, Role, TensorSpec


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """norm → attention → add, norm → feed-forward → add.

    cross_attention: between the two norm → attention to what an encoder made of a source → add.
    residual_multiplier: of what attention and feed-forward add (Granite; Depth-muP, arXiv:2310.02244).
    hyper_connection: what stands in for the adding, where tokens have several residual streams (DeepSeek-V4).
    """

    attention: AttentionConfig | MlaConfig | CompressedAttentionConfig | RecurrentConfig | AbsentConfig
    feed_forward: MlpConfig | MoeConfig | SoftMoeConfig | AbsentConfig
    norm: NormConfig = field(default_factory=NormConfig)
    residual_multiplier: float = 1.0
    hyper_connection: HyperConnectionConfig | None = None
    cross_attention: AttentionConfig | None = None

    def __post_init__(self) -> None:
        _require_factor("residual_multiplier", self.residual_multiplier)
        if self.cross_attention is not None:
            _check_unordered(self.cross_attention, "cross attention", "rope", "relative_bias", "temperature")
            require(self.hyper_connection is None, "cross_attention with hyper_connection; leave one of them out")
        require(
            self.hyper_connection is None or self.residual_multiplier == 1,
            f"residual_multiplier={self.residual_multiplier} with hyper_connection, which learns its own; leave it out",
        )

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        if not isinstance(self.attention, AbsentConfig):
            yield from self.norm.tensors(f"{prefix}.attention_norm", hidden_size)
        yield from self.attention.tensors(f"{prefix}.attention", hidden_size)
        if self.cross_attention is not None:
            yield from self.norm.tensors(f"{prefix}.cross_attention_norm", hidden_size)
            yield from self.cross_attention.tensors(f"{prefix}.cross_attention", hidden_size)
        if not isinstance(self.feed_forward, AbsentConfig):
            yield from self.norm.tensors(f"{prefix}.feed_forward_norm", hidden_size)
        yield from self.feed_forward.tensors(f"{prefix}.feed_forward", hidden_size)
        if self.hyper_connection:
            yield from self.hyper_connection.tensors(f"{prefix}.attention_connection", hidden_size)
            yield from self.hyper_connection.tensors(f"{prefix}.feed_forward_connection", hidden_size)


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Layers in order, then a norm. A decoder is one stack; an encoder-decoder has two."""

    layers: tuple[LayerConfig, ...]
    final_norm: NormConfig = field(default_factory=NormConfig)

    def __post_init__(self) -> None:
        require(len(self.layers) > 0, "a stack without layers; give at least one")
        require(
            all(layer.hyper_connection == self.hyper_connection for layer in self.layers),
            "hyper_connection differs between layers; streams run through all of them, so give every layer the same",
        )
        for index, layer in enumerate(self.layers):
            source = layer.attention.indexer if isinstance(layer.attention, MlaConfig) else None
            require(
                not isinstance(source, int) or (0 <= source < index and _has_indexer(self.layers[source])),
                f"layer {index} takes the tokens that layer {source} chose, which is no earlier one with an indexer",
            )
            source = layer.attention.relative_bias if isinstance(layer.attention, AttentionConfig) else None
            require(
                not isinstance(source, int) or (0 <= source < index and _has_biases(self.layers[source], layer)),
                f"layer {index} takes the relative biases of layer {source}, which is no earlier one with biases for "
                "as many heads",
            )

    def end_tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        """Those after the layers."""
        if self.hyper_connection:
            yield from self.hyper_connection.join_tensors(f"{prefix}stream_join", hidden_size)
        yield from self.final_norm.tensors(f"{prefix}final_norm", hidden_size)

    def score_flops(self, context_length: int) -> int:
        """FLOPs of all layers' scores and weighted values, for one token over `context_length` visible ones."""
        return sum(layer.attention.score_flops(self._num_seen(layer, context_length)) for layer in self.layers)

    def _num_seen(self, layer: LayerConfig, context_length: int) -> int:
        """Of the visible tokens those that a layer is left with by an earlier one's choice."""
        source = layer.attention.indexer if isinstance(layer.attention, MlaConfig) else None
        if not isinstance(source, int):
            return context_length
        chooser = self.layers[source].attention
        assert isinstance(chooser, MlaConfig) and isinstance(chooser.indexer, IndexerConfig), "checked when made"
        return min(context_length, chooser.indexer.top_k)

    @property
    def hyper_connection(self) -> HyperConnectionConfig | None:
        """Of all its layers."""
        return self.layers[0].hyper_connection


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model from token ids to logits.

    encoder: what reads a source text as a whole, for the decoder's cross attention; None where the decoder is all there
    is. Layers are numbered through both, those of the encoder first. decoder_start_token_id: what a target begins with.
    sinusoid: positions that are added to the embeddings, of source and target alike.

    `family` is the Hugging Face `model_type` under which it is saved. `context_length` is the longest sequence the
    positions were made for, in tokens.

    Parameter counts follow one rule, whatever the release claims:
    `total` counts every parameter once (tied tables once); `active_all` takes top_k of num_experts of the expert
    parameters and all others; `active_gemm` is what is multiplied for a token: `active_all` without an input
    embedding table that is only looked up (a tied table stays, since the head multiplies it). Layers that predict
    further tokens (`mtp`) are in none of these, nor in `roles`, since the model answers without them: `mtp_total` and
    `mtp_active` count them.

    mtp: one layer for each further token that the model predicts, each within a part of its own (Multi-Token
    Prediction, DeepSeek-V3, arXiv:2412.19437, sec. 2.2; see `moesaic.models.mtp`).
    embedding_multiplier: of looked-up embeddings; logits_divisor: of logits (Granite; cf. muP, arXiv:2203.03466).
    head_bias: a learned constant is added to each logit (Phi-3.5-MoE).
    """

    family: str
    vocab_size: int
    hidden_size: int
    context_length: int
    decoder: StackConfig
    encoder: StackConfig | None = None
    sinusoid: SinusoidConfig | None = None
    mtp: tuple[LayerConfig, ...] = ()
    tie_word_embeddings: bool = False
    head_bias: bool = False
    embedding_multiplier: float = 1.0
    logits_divisor: float = 1.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "hidden_size", "context_length")
        self._check_stacks()
        _require_factor("embedding_multiplier", self.embedding_multiplier)
        _require_factor("logits_divisor", self.logits_divisor)
        require(
            not self.head_bias or not (self.tie_word_embeddings or self.logits_divisor != 1),
            "head_bias with tie_word_embeddings or logits_divisor; only a head of its own has one, leave it out",
        )
        require(
            self.encoder is None or self.encoder.hyper_connection is None,
            "an encoder with hyper_connection; only decoders without an encoder have streams, leave it out",
        )
        require(
            all(layer.hyper_connection == self.decoder.hyper_connection for layer in self.mtp),
            "hyper_connection differs between the model and its mtp layers; streams run through all, so give them one",
        )
        for index, layer in enumerate(self.layers):
            own = layer.feed_forward.router.settings if isinstance(layer.feed_forward, MoeConfig) else None
            require(
                not isinstance(own, HashSettings) or own.vocab_size >= self.vocab_size,
                f"layer {index} has a hash table for fewer ids than the model's vocab_size={self.vocab_size}; "
                "give its settings that vocab_size",
            )

    def _check_stacks(self) -> None:
        """Encoder and decoder go together, or there is no encoder."""
        needs = self.encoder is not None
        require(
            all((layer.cross_attention is not None) == needs for layer in self.decoder.layers),
            "an encoder and decoder layers without cross_attention; give every decoder layer one"
            if needs
            else "cross_attention without an encoder; give the model one, or leave it out",
        )
        if self.encoder is None:
            return
        require(not self.mtp, "mtp with an encoder, whose targets no layer predicts further; leave it out")
        for layer in self.encoder.layers:
            require(isinstance(layer.attention, AttentionConfig), "an encoder attends by AttentionConfig; give it that")
            if isinstance(layer.attention, AttentionConfig):
                _check_unordered(layer.attention, "an encoder", "temperature")
            require(layer.cross_attention is None, "cross_attention in an encoder; only decoder layers have it")
            require(layer.hyper_connection is None, "hyper_connection in an encoder; leave it out")

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """Those of the encoder, where there is one, then those of the decoder, in the order of their numbers."""
        return (*(self.encoder.layers if self.encoder else ()), *self.decoder.layers)

    @property
    def every_layer(self) -> tuple[LayerConfig, ...]:
        """All layers in the order of their numbers on routing tapes: the model's own, then those of `mtp`."""
        return (*self.layers, *self.mtp)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that route."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.feed_forward, MoeConfig))

    @property
    def leaks_future(self) -> bool:
        """Whether a token's output depends on later ones: such a model cannot write on token by token.

        Its loss on a causal task is not comparable with others': it has seen something of the answers.
        """
        return bool(self.leaking_parts)

    @property
    def leaking_parts(self) -> list[str]:
        """What in it lets tokens see later ones, in words; each once."""
        leaks = (_leak(layer.feed_forward) for layer in self.decoder.layers)
        return sorted({leak for leak in leaks if leak is not None})

    def check_decodable(self) -> None:
        """Raise ConfigError for a model that leaks the future, naming its first such layer."""
        for index, layer in enumerate(self.decoder.layers, len(self.layers) - len(self.decoder.layers)):
            leak = _leak(layer.feed_forward)
            require(
                leak is None,
                f"layer {index} has {leak}, where tokens see later ones, so this model cannot write on token by token; "
                'score whole texts with it, or train one with another router, such as "softmax_topk" or "sigmoid_topk"',
            )

    def check_decoder_only(self, what: str) -> None:
        """Raise ConfigError for a model with an encoder, of which `what` has no use."""
        require(
            self.encoder is None,
            f"{what} needs a model that only decodes, and this {self.family} model has an encoder, too; "
            "`moesaic generate` writes its targets",
        )

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the built model, in the order of its state_dict."""
        yield from self._main_tensors()
        yield from self._mtp_tensors()

    def _main_tensors(self) -> Iterator[TensorSpec]:
        # New logits are as large whether or not a tied table's are divided (T5), where nothing multiplies embeddings.
        gain = self.logits_divisor if self.tie_word_embeddings and self.embedding_multiplier == 1 else 1.0
        yield TensorSpec("embedding.weight", (self.vocab_size, self.hidden_size), "embedding", gain=gain)
        for index, layer in enumerate(self.layers):
            yield from layer.tensors(f"layers.{index}", self.hidden_size)
        if self.encoder is not None:
            yield from self.encoder.end_tensors("encoder_", self.hidden_size)
        yield from self.decoder.end_tensors("", self.hidden_size)
        if not self.tie_word_embeddings:
            yield TensorSpec("head.weight", (self.vocab_size, self.hidden_size), "head")
        if self.head_bias:
            yield TensorSpec("head.bias", (self.vocab_size,), "head")

    def _mtp_tensors(self) -> Iterator[TensorSpec]:
        size = self.hidden_size
        for index, layer in enumerate(self.mtp):
            prefix = f"mtp.{index}"
            yield from layer.norm.tensors(f"{prefix}.embedding_norm", size)
            yield from layer.norm.tensors(f"{prefix}.hidden_norm", size)
            yield TensorSpec(f"{prefix}.projection.weight", (size, 2 * size), "mlp")
            yield from layer.tensors(f"{prefix}.layer", size)
            yield from layer.norm.tensors(f"{prefix}.final_norm", size)
            if layer.hyper_connection:
                yield from layer.hyper_connection.join_tensors(f"{prefix}.stream_join", size)

    def parameters(self) -> Iterator[TensorSpec]:
        """What gradients reach, without the layers that predict further tokens."""
        return (tensor for tensor in self._main_tensors() if tensor.is_parameter)

    def mtp_parameters(self) -> Iterator[TensorSpec]:
        """Those of the layers that predict further tokens."""
        return (tensor for tensor in self._mtp_tensors() if tensor.is_parameter)

    @property
    def total(self) -> int:
        return sum(tensor.numel for tensor in self.parameters())

    @property
    def active_all(self) -> int:
        return sum(tensor.active_numel for tensor in self.parameters())

    @property
    def active_gemm(self) -> int:
        looked_up = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return self.active_all - looked_up

    @property
    def mtp_total(self) -> int:
        """The parameters of all layers that predict further tokens; embedding and head are the model's own."""
        return sum(tensor.numel for tensor in self.mtp_parameters())

    @property
    def mtp_active(self) -> int:
        """Those of them that one token uses."""
        return sum(tensor.active_numel for tensor in self.mtp_parameters())

    @property
    def roles(self) -> dict[Role, int]:
        """Total parameters by role, `mtp` left out; a tied table counts as embedding."""
        counts: dict[Role, int] = dict.fromkeys(ROLES, 0)
        for tensor in self.parameters():
            counts[tensor.role] += tensor.numel
        return counts

    def weight_bytes(self, bytes_per_parameter: float) -> int:
        return round(self.total * bytes_per_parameter)

    def states(self) -> tuple[StateSpec, ...]:
        """What each layer of the decoder keeps of the past, in their order; then what cross attention keeps."""
        cross = (layer.cross_attention.state() for layer in self.decoder.layers if layer.cross_attention)
        return (*(layer.attention.state() for layer in self.decoder.layers), *cross)

    def state_bytes(self, num_tokens: int, bytes_per_element: int = 2) -> int:
        """Bytes of all layers' states after `num_tokens` tokens of one sequence, and of its source if it has one."""
        return sum(state.num_bytes(num_tokens, bytes_per_element) for state in self.states())

    def state_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes that a further token adds to a text as long as the context: what windows keep no longer grows then."""
        length = self.context_length
        grown = self.state_bytes(2 * length, bytes_per_element) - self.state_bytes(length, bytes_per_element)
        return grown // length

    def flops_per_token(self, context_length: int = 0) -> int:
        """FLOPs of one token's forward pass over `context_length` tokens: 2 per multiplied parameter, and attention.

        Soft MoE layers multiply slots and not tokens: see SoftMoeConfig; without a context, a text is one token.
        With an encoder, those of one source token and one target token, over so many of each.
        """
        scores = self.decoder.score_flops(context_length)
        if self.encoder is not None:
            scores += self.encoder.score_flops(context_length)
            cross = (layer.cross_attention for layer in self.decoder.layers if layer.cross_attention)
            scores += sum(attention.score_flops(context_length) for attention in cross)
        soft = [layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, SoftMoeConfig)]
        slots = sum(part.flops_per_token(self.hidden_size, max(1, context_length)) for part in soft)
        in_slots = sum(tensor.numel for part in soft for tensor in part.tensors("", self.hidden_size))
        return 2 * (self.active_gemm - in_slots) + slots + scores

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready tree; every part names its class under "part"."""
        return _to_json(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`. Raises ConfigError for parts or fields it does not know."""
        config = _from_json(tree)
        require(isinstance(config, cls), f"a {type(config).__name__} is not a ModelConfig")
        return config


@dataclass(frozen=True, kw_only=True)
class OutlinedModel(ModelConfig):
    """A model that is described well enough to be counted and planned, and that nothing here can build or run.

    assumed: what was taken for granted, in words, of an architecture that is not known.
    """

    assumed: str = ""


def _has_biases(source: LayerConfig, layer: LayerConfig) -> bool:
    theirs, own = source.attention, layer.attention
    return (
        isinstance(theirs, AttentionConfig)
        and isinstance(theirs.relative_bias, RelativeBiasConfig)
        and isinstance(own, AttentionConfig)
        and own.num_heads == theirs.num_heads
    )


def _check_unordered(attention: AttentionConfig, what: str, *others: str) -> None:
    """Raise ConfigError for settings that need tokens which see earlier ones only."""
    for name in ("window", "chunk", *others):
        require(getattr(attention, name) is None, f"{name} in {what}, which has none; leave it out (null)")


def _require_factor(name: str, value: float) -> None:
    require(0 < value < math.inf, f"{name}={value}; it must be above 0 and finite")


def _has_indexer(layer: LayerConfig) -> bool:
    return isinstance(layer.attention, MlaConfig) and isinstance(layer.attention.indexer, IndexerConfig)


def _leak(part: MlpConfig | MoeConfig | SoftMoeConfig | AbsentConfig) -> str | None:
    """What in a feed-forward part lets tokens see later ones, in a message's words; None where nothing does."""
    if isinstance(part, SoftMoeConfig):
        return "Soft MoE"
    return f"router {part.router.name!r}" if isinstance(part, MoeConfig) and part.router.kind.leaks else None


_PARTS = {
    part.__name__: part
    for part in (
        NormConfig,
        LinearConfig,
        YarnConfig,
        Llama3Config,
        LongRopeConfig,
        RopeConfig,
        TemperatureConfig,
        RelativeBiasConfig,
        SinusoidConfig,
        AttentionConfig,
        ClampedSwiglu,
        HyperConnectionConfig,
        IndexerConfig,
        MlaConfig,
        EntryIndexerConfig,
        CompressionConfig,
        CompressedAttentionConfig,
        MlpConfig,
        RouterConfig,
        GroupConfig,
        NoisySettings,
        Top2Settings,
        HashSettings,
        SparseMixerSettings,
        SinkhornSettings,
        ReluSettings,
        TopPSettings,
        NullSettings,
        CapacityConfig,
        MoeConfig,
        SoftMoeConfig,
        RecurrentConfig,
        AbsentConfig,
        OutlinedAttention,
        OutlinedMla,
        OutlinedMoe,
        LayerConfig,
        StackConfig,
        ModelConfig,
        OutlinedModel,
    )
}


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: _to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"part": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {name: _from_json(item) for name, item in value.items() if name != "part"}
    part = _PARTS.get(value.get("part", ""))
    if part is None:
        raise ConfigError(f"unknown part {value.get('part')!r} in a model description; known: {', '.join(_PARTS)}")
    known = {field.name for field in dataclasses.fields(part)}
    require(fields.keys() <= known, f"unknown field {sorted(fields.keys() - known)} in {part.__name__}")
    return part(**fields)
