"""How a layer looks at other tokens, how they know where they stand, and what is kept of them. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moesaic.checks import require, require_positive
from moesaic.config.norm import NormConfig
from moesaic.tensor_spec import TensorSpec


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
