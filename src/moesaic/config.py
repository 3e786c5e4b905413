"""The one description of a model: a frozen tree of parts that knows its own tensors, sizes and costs. No torch here.

Every number that a planner, a cache or a checkpoint reader needs is derived from `ModelConfig.tensors()` and
`ModelConfig.states()`; the built model has exactly these tensors, and a test holds that.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from moesaic.capacity_config import CapacityConfig, refusal
from moesaic.checks import require, require_positive, require_share
from moesaic.errors import ConfigError
from moesaic.router_config import (
    GroupConfig,
    HashSettings,
    NoisySettings,
    NullSettings,
    ReluSettings,
    RouterConfig,
    SinkhornSettings,
    SparseMixerSettings,
    TopPSettings,
)
from moesaic.tensor_spec import ROLES, Role, TensorSpec


@dataclass(frozen=True, kw_only=True)
class StateSpec:
    """What one layer keeps of the tokens it has seen.

    kind: "full" keeps every token; "window" keeps the last `window` tokens. (Latent, compressed and recurrent states
    join here with the parts that need them.) `elements_per_token` counts numbers, not bytes.
    """

    kind: Literal["full", "window"]
    elements_per_token: int
    window: int | None = None
    can_rollback: bool = True
    can_share_prefix: bool = True

    def num_bytes(self, num_tokens: int, bytes_per_element: int) -> int:
        """Bytes kept after `num_tokens` tokens of one sequence."""
        kept = num_tokens if self.window is None else min(num_tokens, self.window)
        return kept * self.elements_per_token * bytes_per_element


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """RMSNorm (Zhang & Sennrich, arXiv:1910.07467, eq. 4) with a learned weight."""

    eps: float = 1e-6

    def __post_init__(self) -> None:
        require(self.eps > 0, f"norm eps={self.eps}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions (RoFormer, arXiv:2104.09864, eq. 34); dimension i is rotated with i + head_dim/2."""

    theta: float = 10_000.0

    def __post_init__(self) -> None:
        require(self.theta > 0, f"rope theta={self.theta}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention (arXiv:2305.13245), optionally over the last `window` tokens, the current one included.

    `head_norm` normalises each query and key head before the rotation (Qwen3).
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: RopeConfig = RopeConfig()
    window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    head_norm: NormConfig | None = None

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "num_key_value_heads", "head_dim")
        require(
            self.num_heads % self.num_key_value_heads == 0,
            f"num_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_key_value_heads}; "
            f"use one of {[g for g in range(1, self.num_heads + 1) if self.num_heads % g == 0]}",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} is odd; rotary positions need an even one")
        if self.window is not None:
            require_positive(self, "window")

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        query_size = self.num_heads * self.head_dim
        key_value_size = self.num_key_value_heads * self.head_dim
        for name, size in (("q_proj", query_size), ("k_proj", key_value_size), ("v_proj", key_value_size)):
            yield TensorSpec(f"{prefix}.{name}.weight", (size, hidden_size), "attention")
            if self.qkv_bias:
                yield TensorSpec(f"{prefix}.{name}.bias", (size,), "attention")
        yield TensorSpec(f"{prefix}.o_proj.weight", (hidden_size, query_size), "attention")
        if self.output_bias:
            yield TensorSpec(f"{prefix}.o_proj.bias", (hidden_size,), "attention")
        if self.head_norm:
            yield TensorSpec(f"{prefix}.q_norm.weight", (self.head_dim,), "norm")
            yield TensorSpec(f"{prefix}.k_norm.weight", (self.head_dim,), "norm")

    def state(self) -> StateSpec:
        elements = 2 * self.num_key_value_heads * self.head_dim
        if self.window is None:
            return StateSpec(kind="full", elements_per_token=elements)
        return StateSpec(kind="window", elements_per_token=elements, window=self.window, can_rollback=False)

    def score_flops(self, context_length: int) -> int:
        """FLOPs of one token's scores and weighted values over `context_length` visible tokens."""
        visible = context_length if self.window is None else min(context_length, self.window)
        return 4 * self.num_heads * self.head_dim * visible


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """A gated feed-forward block: down(act(gate(x)) * up(x)) (SwiGLU, arXiv:2002.05202, eq. 6)."""

    intermediate_size: int
    activation: str = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "intermediate_size")

    def tensors(self, prefix: str, hidden_size: int, role: Role = "mlp") -> Iterator[TensorSpec]:
        shapes = {
            "gate_proj": (self.intermediate_size, hidden_size),
            "up_proj": (self.intermediate_size, hidden_size),
            "down_proj": (hidden_size, self.intermediate_size),
        }
        for name, shape in shapes.items():
            yield TensorSpec(f"{prefix}.{name}.weight", shape, role)
            if self.bias:
                yield TensorSpec(f"{prefix}.{name}.bias", shape[:1], role)


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """A router over gated experts, and optionally a shared expert that every token passes (arXiv:2401.06066).

    capacity: the limit to an expert's rows while training; None: dropless. expert_dropout: of the routed experts' inner
    activations while training (Switch, arXiv:2101.03961, sec. 2.4).
    """

    router: RouterConfig
    intermediate_size: int
    activation: str = "silu"
    shared: MlpConfig | None = None
    capacity: CapacityConfig | None = None
    expert_dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "intermediate_size")
        require_share(self, "expert_dropout")
        if self.capacity is not None:
            reason = refusal(self.router, self.capacity, has_shared=self.shared is not None)
            require(reason is None, reason or "")

    @property
    def num_experts(self) -> int:
        return self.router.num_experts

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        num_experts, top_k = self.num_experts, self.router.top_k
        yield from self.router.tensors(f"{prefix}.router", hidden_size)
        for name, shape in (
            ("gate_up", (num_experts, 2 * self.intermediate_size, hidden_size)),
            ("down", (num_experts, hidden_size, self.intermediate_size)),
        ):
            yield TensorSpec(f"{prefix}.experts.{name}", shape, "experts", top_k_of=(top_k, num_experts))
        if self.shared:
            yield from self.shared.tensors(f"{prefix}.shared_experts", hidden_size, "shared_experts")


@dataclass(frozen=True, kw_only=True)
class SoftMoeConfig:
    """Experts whose inputs, `slots_per_expert` each, are weighted means of a text's tokens (arXiv:2308.00951).

    Every slot is computed however many tokens there are. All parameters count as active, since each of them has a part
    in every token; the FLOPs of a token are those of the slots, shared by the tokens of a text.
    expert_dropout: as MoeConfig's.
    """

    num_experts: int
    slots_per_expert: int
    intermediate_size: int
    activation: str = "silu"
    expert_dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "num_experts", "slots_per_expert", "intermediate_size")
        require_share(self, "expert_dropout")

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{prefix}.slots", (self.num_experts, self.slots_per_expert, hidden_size), "router")
        yield TensorSpec(f"{prefix}.scale", (1,), "router", start=1.0)
        inner = self.intermediate_size
        yield TensorSpec(f"{prefix}.experts.gate_up", (self.num_experts, 2 * inner, hidden_size), "experts")
        yield TensorSpec(f"{prefix}.experts.down", (self.num_experts, hidden_size, inner), "experts")

    def flops_per_token(self, hidden_size: int, num_tokens: int) -> int:
        """FLOPs for each of the `num_tokens` tokens of a text: its scores, into the slots and out, and the slots."""
        num_slots = self.num_experts * self.slots_per_expert
        slot = 2 * 3 * self.intermediate_size * hidden_size
        return 3 * 2 * num_slots * hidden_size + num_slots * slot // num_tokens


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """norm → attention → add, norm → feed-forward → add."""

    attention: AttentionConfig
    feed_forward: MlpConfig | MoeConfig | SoftMoeConfig
    norm: NormConfig = NormConfig()

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{prefix}.attention_norm.weight", (hidden_size,), "norm")
        yield from self.attention.tensors(f"{prefix}.attention", hidden_size)
        yield TensorSpec(f"{prefix}.feed_forward_norm.weight", (hidden_size,), "norm")
        yield from self.feed_forward.tensors(f"{prefix}.feed_forward", hidden_size)


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Layers in order, then a norm. A decoder is one stack; an encoder-decoder has two."""

    layers: tuple[LayerConfig, ...]
    final_norm: NormConfig = NormConfig()

    def __post_init__(self) -> None:
        require(len(self.layers) > 0, "a stack without layers; give at least one")

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        for index, layer in enumerate(self.layers):
            yield from layer.tensors(f"{prefix}layers.{index}", hidden_size)
        yield TensorSpec(f"{prefix}final_norm.weight", (hidden_size,), "norm")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model from token ids to logits.

    `family` is the Hugging Face `model_type` under which it is saved. `context_length` is the longest sequence the
    positions were made for, in tokens.

    Parameter counts follow one rule, whatever the release claims:
    `total` counts every parameter once (tied tables once); `active_all` takes top_k of num_experts of the expert
    parameters and all others; `active_gemm` is what is multiplied for a token: `active_all` without an input
    embedding table that is only looked up (a tied table stays, since the head multiplies it).
    """

    family: str
    vocab_size: int
    hidden_size: int
    context_length: int
    decoder: StackConfig
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "hidden_size", "context_length")
        for index, layer in enumerate(self.layers):
            own = layer.feed_forward.router.settings if isinstance(layer.feed_forward, MoeConfig) else None
            require(
                not isinstance(own, HashSettings) or own.vocab_size >= self.vocab_size,
                f"layer {index} has a hash table for fewer ids than the model's vocab_size={self.vocab_size}; "
                "give its settings that vocab_size",
            )

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        return self.decoder.layers

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
        leaks = (_leak(layer.feed_forward) for layer in self.layers)
        return sorted({leak for leak in leaks if leak is not None})

    def check_decodable(self) -> None:
        """Raise ConfigError for a model that leaks the future, naming its first such layer."""
        for index, layer in enumerate(self.layers):
            leak = _leak(layer.feed_forward)
            require(
                leak is None,
                f"layer {index} has {leak}, where tokens see later ones, so this model cannot write on token by token; "
                'score whole texts with it, or train one with another router, such as "softmax_topk" or "sigmoid_topk"',
            )

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the built model, in the order of its state_dict."""
        yield TensorSpec("embedding.weight", (self.vocab_size, self.hidden_size), "embedding")
        yield from self.decoder.tensors("", self.hidden_size)
        if not self.tie_word_embeddings:
            yield TensorSpec("head.weight", (self.vocab_size, self.hidden_size), "head")

    def parameters(self) -> Iterator[TensorSpec]:
        return (tensor for tensor in self.tensors() if tensor.is_parameter)

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
    def roles(self) -> dict[Role, int]:
        """Total parameters by role; a tied table counts as embedding."""
        counts: dict[Role, int] = dict.fromkeys(ROLES, 0)
        for tensor in self.parameters():
            counts[tensor.role] += tensor.numel
        return counts

    def weight_bytes(self, bytes_per_parameter: float) -> int:
        return round(self.total * bytes_per_parameter)

    def states(self) -> tuple[StateSpec, ...]:
        """What each layer keeps of the past, in layer order."""
        return tuple(layer.attention.state() for layer in self.layers)

    def state_bytes(self, num_tokens: int, bytes_per_element: int = 2) -> int:
        """Bytes of all layers' states after `num_tokens` tokens of one sequence."""
        return sum(state.num_bytes(num_tokens, bytes_per_element) for state in self.states())

    def flops_per_token(self, context_length: int = 0) -> int:
        """FLOPs of one token's forward pass over `context_length` tokens: 2 per multiplied parameter, and attention.

        Soft MoE layers multiply slots and not tokens: see SoftMoeConfig; without a context, a text is one token.
        """
        scores = sum(layer.attention.score_flops(context_length) for layer in self.layers)
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


def _leak(part: MlpConfig | MoeConfig | SoftMoeConfig) -> str | None:
    """What in a feed-forward part lets tokens see later ones, in a message's words; None where nothing does."""
    if isinstance(part, SoftMoeConfig):
        return "Soft MoE"
    return f"router {part.router.name!r}" if isinstance(part, MoeConfig) and part.router.kind.leaks else None


_PARTS = {
    part.__name__: part
    for part in (
        NormConfig,
        RopeConfig,
        AttentionConfig,
        MlpConfig,
        RouterConfig,
        GroupConfig,
        NoisySettings,
        HashSettings,
        SparseMixerSettings,
        SinkhornSettings,
        ReluSettings,
        TopPSettings,
        NullSettings,
        CapacityConfig,
        MoeConfig,
        SoftMoeConfig,
        LayerConfig,
        StackConfig,
        ModelConfig,
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
