"""Attention through a small latent that stands for all keys and values of a token. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from moesaic.checks import require, require_positive
from moesaic.config.attention import StateSpec
from moesaic.config.indexer import IndexerConfig
from moesaic.config.norm import NormConfig
from moesaic.config.rope import RopeConfig, YarnConfig
from moesaic.tensor_spec import TensorSpec

INNER_NORM = NormConfig(eps=1e-6)
"""Of the latents: the same in every release, whatever norm the layers have."""


@dataclass(frozen=True, kw_only=True)
class MlaConfig:
    """Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, eq. 9-19).

    Of each token only a latent of `latent_rank` numbers (c^KV) and one key of `rope_dim` numbers that all heads share
    (k^R) is kept; a head's keys of `nope_dim` and values of `value_dim` numbers are projected from the latent.
    query_rank: the width of the queries' own latent (c^Q); None: they are projected from the hidden state.
    rope turns the `rope_dim` last dimensions of each query head, and the shared key.
    bias: of what projects the hidden state to latents and shared key, and of the output projection.
    indexer: chooses the tokens that queries attend to; a number: those that the layer of this number chose, an earlier
    one (arXiv:2603.12201); None: all.
    """

    num_heads: int
    latent_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    query_rank: int | None = None
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(layout="interleaved"))
    bias: bool = False
    indexer: IndexerConfig | int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "latent_rank", "nope_dim", "rope_dim", "value_dim")
        if self.query_rank is not None:
            require_positive(self, "query_rank")
        self.rope.turning(self.rope_dim)
        if isinstance(self.indexer, IndexerConfig):
            require(self.query_rank is not None, "an indexer without query_rank; its queries come from that latent")
            self.index_rope.turning(self.indexer.head_dim)

    @property
    def head_dim(self) -> int:
        """The width of a query, and of an expanded key."""
        return self.nope_dim + self.rope_dim

    @property
    def index_rope(self) -> RopeConfig:
        """How the first dimensions of the indexer's queries and keys turn."""
        layout = self.indexer.layout if isinstance(self.indexer, IndexerConfig) else self.rope.layout
        return replace(self.rope, layout=layout, rotary_dim=self.rope_dim)

    @property
    def scale(self) -> float:
        """What scores are multiplied by: 1/sqrt(head_dim) (eq. 18), and YaRN's correction of it."""
        correction = self.rope.scaling.score_factor if isinstance(self.rope.scaling, YarnConfig) else 1.0
        return self.head_dim**-0.5 * correction

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        """Projections down to the latents and up from them, norms and indexer, in the order of the state_dict."""
        if self.query_rank is None:
            yield TensorSpec(f"{prefix}.q_proj.weight", (self.num_heads * self.head_dim, hidden_size), "attention")
        else:
            yield from self._projection(f"{prefix}.q_a_proj", self.query_rank, hidden_size)
            yield TensorSpec(f"{prefix}.q_a_norm.weight", (self.query_rank,), "norm")
            shape = (self.num_heads * self.head_dim, self.query_rank)
            yield TensorSpec(f"{prefix}.q_b_proj.weight", shape, "attention")
        yield from self._projection(f"{prefix}.kv_a_proj", self.latent_rank + self.rope_dim, hidden_size)
        yield TensorSpec(f"{prefix}.kv_a_norm.weight", (self.latent_rank,), "norm")
        expanded = self.num_heads * (self.nope_dim + self.value_dim)
        yield TensorSpec(f"{prefix}.kv_b_proj.weight", (expanded, self.latent_rank), "attention")
        yield from self._projection(f"{prefix}.o_proj", hidden_size, self.num_heads * self.value_dim)
        if isinstance(self.indexer, IndexerConfig) and self.query_rank is not None:
            yield from self.indexer.tensors(f"{prefix}.indexer", hidden_size, self.query_rank)

    def _projection(self, name: str, outputs: int, inputs: int) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{name}.weight", (outputs, inputs), "attention")
        if self.bias:
            yield TensorSpec(f"{name}.bias", (outputs,), "attention")

    def state(self) -> StateSpec:
        elements = self.latent_rank + self.rope_dim
        if isinstance(self.indexer, IndexerConfig):
            elements += self.indexer.head_dim
        return StateSpec(kind="latent", elements_per_token=elements)

    def score_flops(self, context_length: int) -> int:
        """FLOPs of one token's scores and weighted values over `context_length` tokens, once these are expanded.

        With an indexer, of the chosen ones, and of choosing. A layer that reuses a choice is told how many these are.
        """
        attending = 2 * self.num_heads * (self.head_dim + self.value_dim)
        if not isinstance(self.indexer, IndexerConfig):
            return attending * context_length
        choosing = 2 * self.indexer.num_heads * (self.indexer.head_dim + 1)
        return attending * min(context_length, self.indexer.top_k) + choosing * context_length
