"""Parts that are known by their tensors, states and work alone: they can be counted and planned, and not built.

No torch here. For architectures that are described before they run (`families/_counted.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.checks import require_positive
from moesaic.config.attention import AttentionConfig, StateSpec
from moesaic.config.feed_forward import MoeConfig
from moesaic.config.mla import MlaConfig
from moesaic.tensor_spec import Role, TensorSpec

Outlined = tuple[str, tuple[int, ...], Role]
"""A tensor's name within its part, its shape, what it is for."""


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """A part that carries a state of fixed size from token to token, in place of keys and values.

    num_heads, head_dim: of its values; it can be split by heads. state_size: numbers of the state, kept in fp32;
    conv_size: inputs that a convolution waits for, kept in 16 bits. state_flops: of a token, to change the state and
    to read from it, step by step; a prompt computed in chunks takes about as much again on other products.
    """

    num_heads: int
    head_dim: int
    weights: tuple[Outlined, ...]
    state_size: int
    conv_size: int
    state_flops: int

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "head_dim")

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        """Those of `weights`; the hidden size is in their shapes."""
        del hidden_size
        yield from _named(self.weights, prefix)

    def state(self) -> StateSpec:
        return StateSpec(
            kind="recurrent",
            elements_per_token=0,
            fixed_bytes=4 * self.state_size + 2 * self.conv_size,
            can_rollback=False,
            can_share_prefix=False,
        )

    def score_flops(self, context_length: int) -> int:
        """FLOPs of one token, however long the context is."""
        del context_length
        return self.state_flops


@dataclass(frozen=True, kw_only=True)
class AbsentConfig:
    """What a layer of one part alone has in place of the other, and of its norm (Nemotron-H, arXiv:2504.03624)."""

    num_heads: int = 0

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        del prefix, hidden_size
        yield from ()

    def state(self) -> StateSpec:
        return StateSpec(kind="recurrent", elements_per_token=0)

    def score_flops(self, context_length: int) -> int:
        del context_length
        return 0


@dataclass(frozen=True, kw_only=True)
class OutlinedAttention(AttentionConfig):
    """Grouped-query attention with values of another width, of which values have no projection, or with more tensors.

    value_dim: None: head_dim. values_are_keys: values are projected by the keys' matrix (Gemma 4); both are cached.
    more: gates of the output, indexers, norms. index_size: further numbers kept of a token.
    """

    value_dim: int | None = None
    values_are_keys: bool = False
    more: tuple[Outlined, ...] = ()
    index_size: int = 0

    @property
    def value_size(self) -> int:
        return self.value_dim or self.head_dim

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        for spec in super().tensors(prefix, hidden_size):
            if spec.name == f"{prefix}.o_proj.weight":
                spec = spec._replace(shape=(hidden_size, self.num_heads * self.value_size))
            if spec.name.startswith(f"{prefix}.v_proj."):
                if self.values_are_keys:
                    continue
                spec = spec._replace(shape=(self.num_key_value_heads * self.value_size, *spec.shape[1:]))
            yield spec
        yield from _named(self.more, prefix)

    def state(self) -> StateSpec:
        kept = self.num_key_value_heads * (self.head_dim + self.value_size) + self.index_size
        if self.reach is None:
            return StateSpec(kind="full", elements_per_token=kept)
        return StateSpec(kind="window", elements_per_token=kept, window=self.reach, can_rollback=False)

    def score_flops(self, context_length: int) -> int:
        visible = context_length if self.reach is None else min(context_length, self.reach)
        return 2 * self.num_heads * (self.head_dim + self.value_size) * visible


@dataclass(frozen=True, kw_only=True)
class OutlinedMla(MlaConfig):
    """Latent attention with more tensors, such as a gate of its output (Kimi K3)."""

    more: tuple[Outlined, ...] = ()

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        yield from super().tensors(prefix, hidden_size)
        yield from _named(self.more, prefix)


@dataclass(frozen=True, kw_only=True)
class OutlinedMoe(MoeConfig):
    """Experts that work at a width of their own, or with more tensors that every token passes.

    expert_size: None: the model's; else `more` has the way there and back (Nemotron 3 Super).
    """

    expert_size: int | None = None
    more: tuple[Outlined, ...] = ()

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        width = self.expert_size or hidden_size
        for spec in super().tensors(prefix, hidden_size):
            if spec.role == "experts" and len(spec.shape) == 3:
                into = spec.name.endswith("up")
                spec = spec._replace(shape=(*spec.shape[:2], width) if into else (spec.shape[0], width, spec.shape[2]))
            yield spec
        yield from _named(self.more, prefix)


def _named(weights: tuple[Outlined, ...], prefix: str) -> Iterator[TensorSpec]:
    return (TensorSpec(f"{prefix}.{name}", tuple(shape), role) for name, shape, role in weights)
