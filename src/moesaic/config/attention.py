"""How a layer looks at other tokens, and what is kept of them. No torch here."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from moesaic.checks import require, require_positive
from moesaic.config.norm import NormConfig
from moesaic.config.positions import RelativeBiasConfig
from moesaic.config.rope import RopeConfig
from moesaic.tensor_spec import TensorSpec


@dataclass(frozen=True, kw_only=True)
class StateSpec:
    """What one layer keeps of the tokens it has seen.

    kind: "full" keeps every token; "window" keeps the last `window` tokens; "latent" keeps of every token what its keys
    and values are projected from; "compressed" keeps the last `window` tokens, an entry of `elements_per_entry` for
    every `ratio` tokens, and of the last `pending` tokens what is yet to go into entries, `elements_per_pending` each;
    "recurrent" keeps `fixed_bytes` however many tokens there were. Elements are numbers, not bytes.
    """

    kind: Literal["full", "window", "latent", "compressed", "recurrent"]
    elements_per_token: int
    window: int | None = None
    ratio: int | None = None
    elements_per_entry: int = 0
    pending: int = 0
    elements_per_pending: int = 0
    fixed_bytes: int = 0
    can_rollback: bool = True
    can_share_prefix: bool = True

    def num_bytes(self, num_tokens: int, bytes_per_element: int) -> int:
        """Bytes kept after `num_tokens` tokens of one sequence."""
        kept = num_tokens if self.window is None else min(num_tokens, self.window)
        entries = 0 if self.ratio is None else num_tokens // self.ratio
        compressed = entries * self.elements_per_entry + min(num_tokens, self.pending) * self.elements_per_pending
        return (kept * self.elements_per_token + compressed) * bytes_per_element + self.fixed_bytes * (num_tokens > 0)


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """Queries that grow with their position p: times 1 + scale * ln(1 + floor((p + 1) / interval)) (Llama 4).

    So that softmax over many tokens stays as sharp as over few (cf. arXiv:2501.19399, eq. 3).
    """

    interval: int = 8192
    scale: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self, "interval")
        require(self.scale >= 0, f"scale={self.scale} in TemperatureConfig; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention (arXiv:2305.13245), optionally over the last `window` tokens, the current one included.

    `head_norm` normalises each query and key head before the rotation (Qwen3); projection_norm all heads of the
    queries as one vector, and all of the keys (OLMoE). clip: queries, keys and values are held between -clip and clip,
    before the rotation (DBRX).
    rope: None leaves positions out (NoPE). chunk: tokens see those of their own chunk alone, so many tokens from the
    first one on (Llama 4). scale: what scores are multiplied by; None: 1/sqrt(head_dim). sinks: each head has a logit
    that takes part in the softmax as a token would that has nothing to say (gpt-oss).
    rotated_norm: each query and key head is divided by its root mean square after the rotation, without a learned
    weight (Llama 4). temperature: queries grow with their position.
    relative_bias: scores get a bias by distance; a number is that of the earlier layer, counted in its stack, whose
    biases this one takes (T5).
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    window: int | None = None
    chunk: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    head_norm: NormConfig | None = None
    projection_norm: NormConfig | None = None
    clip: float | None = None
    rotated_norm: NormConfig | None = None
    temperature: TemperatureConfig | None = None
    scale: float | None = None
    sinks: bool = False
    relative_bias: RelativeBiasConfig | int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "num_key_value_heads", "head_dim")
        require(
            self.num_heads % self.num_key_value_heads == 0,
            f"num_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_key_value_heads}; "
            f"use one of {[g for g in range(1, self.num_heads + 1) if self.num_heads % g == 0]}",
        )
        if self.rope is not None:
            self.rope.turning(self.head_dim)
        require_positive(self, *(name for name in ("window", "chunk") if getattr(self, name) is not None))
        require(
            self.window is None or self.chunk is None,
            f"window={self.window} and chunk={self.chunk}; a layer looks at one of them, leave the other out",
        )
        require(
            self.scale is None or 0 < self.scale < math.inf,
            f"scale={self.scale} in AttentionConfig; it must be above 0 and finite",
        )

        require(
            self.head_norm is None or self.projection_norm is None,
            "head_norm and projection_norm; queries and keys have one norm before the rotation, leave the other out",
        )
        require(not self.sinks or self.relative_bias is None, "sinks with relative_bias; leave one of them out")
        require(self.clip is None or self.clip > 0, f"clip={self.clip} in AttentionConfig; it must be above 0")

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        """Projections, biases, norms and sinks of one layer, in the order of its state_dict."""
        query_size = self.num_heads * self.head_dim
        key_value_size = self.num_key_value_heads * self.head_dim
        if self.sinks:
            yield TensorSpec(f"{prefix}.sinks", (self.num_heads,), "attention")
        if isinstance(self.relative_bias, RelativeBiasConfig):
            yield from self.relative_bias.tensors(f"{prefix}.relative_bias", self.num_heads)
        # New scores are about as large as those that are divided by sqrt(head_dim), whatever the scale (T5: 1).
        gains = {"q_proj": min(1.0, self.head_dim**-0.5 / (self.scale or self.head_dim**-0.5))}
        for name, size in (("q_proj", query_size), ("k_proj", key_value_size), ("v_proj", key_value_size)):
            yield TensorSpec(f"{prefix}.{name}.weight", (size, hidden_size), "attention", gain=gains.get(name, 1.0))
            if self.qkv_bias:
                yield TensorSpec(f"{prefix}.{name}.bias", (size,), "attention")
        yield TensorSpec(f"{prefix}.o_proj.weight", (hidden_size, query_size), "attention")
        if self.output_bias:
            yield TensorSpec(f"{prefix}.o_proj.bias", (hidden_size,), "attention")
        if self.head_norm:
            yield from self.head_norm.tensors(f"{prefix}.q_norm", self.head_dim)
            yield from self.head_norm.tensors(f"{prefix}.k_norm", self.head_dim)
        if self.projection_norm:
            yield from self.projection_norm.tensors(f"{prefix}.q_norm", query_size)
            yield from self.projection_norm.tensors(f"{prefix}.k_norm", key_value_size)

    def state(self) -> StateSpec:
        elements = 2 * self.num_key_value_heads * self.head_dim
        if self.reach is None:
            return StateSpec(kind="full", elements_per_token=elements)
        return StateSpec(kind="window", elements_per_token=elements, window=self.reach, can_rollback=False)

    @property
    def reach(self) -> int | None:
        """How many tokens one sees at most; None: all."""
        return self.window or self.chunk

    def score_flops(self, context_length: int) -> int:
        """FLOPs of one token's scores and weighted values over `context_length` visible tokens."""
        visible = context_length if self.reach is None else min(context_length, self.reach)
        return 4 * self.num_heads * self.head_dim * visible
