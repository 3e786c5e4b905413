"""Which tokens a query attends to, chosen by a small attention of its own. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moesaic.checks import require, require_positive
from moesaic.config.norm import NormConfig
from moesaic.tensor_spec import TensorSpec

KEY_NORM = NormConfig(kind="layer", eps=1e-6, bias=True)
"""Of the index keys: the same in every release."""


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv:2512.02556, eq. 1-2).

    Each query attends to the `top_k` visible tokens with the highest index scores, to all where there are no more.
    Index scores are those of `num_heads` queries of `head_dim`, projected from the queries' latent, with one key a
    token; the first dimensions of both turn as latent attention's do, paired as `layout` says (see RopeConfig).
    """

    num_heads: int
    head_dim: int
    top_k: int
    layout: Literal["half", "interleaved"] = "half"

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "head_dim", "top_k")
        require(self.layout in ("half", "interleaved"), f"index layout={self.layout!r}; known: half, interleaved")

    def tensors(self, prefix: str, hidden_size: int, query_rank: int) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{prefix}.q_proj.weight", (self.num_heads * self.head_dim, query_rank), "attention")
        yield TensorSpec(f"{prefix}.k_proj.weight", (self.head_dim, hidden_size), "attention")
        yield from KEY_NORM.tensors(f"{prefix}.k_norm", self.head_dim)
        yield TensorSpec(f"{prefix}.head_weights.weight", (self.num_heads, hidden_size), "attention")
