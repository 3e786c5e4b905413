"""Attention to the last tokens, and to compressed entries that stand for the tokens of whole windows. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from moesaic.checks import require, require_positive
from moesaic.config.attention import StateSpec
from moesaic.config.norm import NormConfig
from moesaic.config.rope import LongRopeConfig, RopeConfig
from moesaic.tensor_spec import TensorSpec


@dataclass(frozen=True, kw_only=True)
class EntryIndexerConfig:
    """Chooses for every query the `top_k` compressed entries it attends to (DeepSeek-V4, sec. 2.3.1, eq. 13-17).

    As the lightning indexer of V3.2 does with tokens: by `num_heads` queries of `head_dim`, projected from the queries'
    latent; its keys are entries of `head_dim` that it compresses by itself.
    """

    num_heads: int
    head_dim: int
    top_k: int

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "head_dim", "top_k")


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """One entry for every `ratio` tokens: their mean, weighted by a learned softmax per dimension.

    overlap: each entry also takes from the `ratio` tokens before its own, by projections of their own (CSA, sec. 2.3.1,
    eq. 9-12); else from its own alone (HCA, sec. 2.3.2, eq. 20-23).
    indexer: chooses the entries that queries attend to; None: all.
    """

    ratio: int
    overlap: bool = False
    indexer: EntryIndexerConfig | None = None

    def __post_init__(self) -> None:
        require_positive(self, "ratio")

    @property
    def pending(self) -> int:
        """Of how many tokens at the end of a text something is yet to go into an entry, at most."""
        return 2 * self.ratio - 1 if self.overlap else self.ratio - 1

    def source_size(self, head_dim: int) -> int:
        """How many numbers a token brings to entries of `head_dim`: values and gates, both twice where they overlap."""
        return (4 if self.overlap else 2) * head_dim

    def tensors(self, prefix: str, head_dim: int, hidden_size: int, query_rank: int) -> Iterator[TensorSpec]:
        """Compressor and indexer of one attention, in the order of their state_dicts."""
        yield from self._compressor_tensors(f"{prefix}.compressor", head_dim, hidden_size)
        if self.indexer is None:
            return
        num_heads, index_dim = self.indexer.num_heads, self.indexer.head_dim
        yield from self._compressor_tensors(f"{prefix}.indexer.compressor", index_dim, hidden_size)
        yield TensorSpec(f"{prefix}.indexer.q_proj.weight", (num_heads * index_dim, query_rank), "attention")
        yield TensorSpec(f"{prefix}.indexer.head_weights.weight", (num_heads, hidden_size), "attention")

    def _compressor_tensors(self, prefix: str, head_dim: int, hidden_size: int) -> Iterator[TensorSpec]:
        half = self.source_size(head_dim) // 2
        yield TensorSpec(f"{prefix}.position_bias", (self.ratio, half), "attention", dtype="float32", start=0.0)
        yield TensorSpec(f"{prefix}.kv_proj.weight", (half, hidden_size), "attention")
        yield TensorSpec(f"{prefix}.gate_proj.weight", (half, hidden_size), "attention")
        yield TensorSpec(f"{prefix}.kv_norm.weight", (head_dim,), "norm")


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionConfig:
    """The attention of DeepSeek-V4 (its technical report, sec. 2.3): a window of tokens, and compressed entries.

    Of each token one vector of `head_dim` is kept, which is key and value of all heads alike. Queries see those of the
    last `window` tokens, the current one included, and the entries of all windows that are full (`compression`; None:
    the last tokens alone). Queries are projected from a latent of `query_rank`.
    rope turns the last `rotary_dim` dimensions of queries, keys and entries; since keys are values, what comes out of
    attention is turned back by the query's position.
    output_groups, output_rank: the heads are projected in so many groups, each to `output_rank` numbers, and these
    together to the hidden size. Every head has a sink: a logit that takes part in its softmax and stands for no value.
    norm: of the latents, keys and entries; of each query head, without a weight.
    """

    num_heads: int
    head_dim: int
    query_rank: int
    window: int
    output_groups: int
    output_rank: int
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(layout="interleaved"))
    compression: CompressionConfig | None = None
    norm: NormConfig = field(default_factory=NormConfig)

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "head_dim", "query_rank", "window", "output_groups", "output_rank")
        require(
            self.num_heads % self.output_groups == 0,
            f"num_heads={self.num_heads} is not a multiple of output_groups={self.output_groups}; "
            f"use one of {[g for g in range(1, self.num_heads + 1) if self.num_heads % g == 0]}",
        )
        require(self.norm.kind == "rms", f"norm kind={self.norm.kind!r} in CompressedAttentionConfig; known: rms")
        require(
            not isinstance(self.rope.scaling, LongRopeConfig),
            "LongRopeConfig in CompressedAttentionConfig; entries cannot be turned anew when a text grows, use another",
        )
        turning = self.rope.turning(self.head_dim)
        indexer = self.indexer
        require(
            indexer is None or turning <= indexer.head_dim,
            f"{turning} dimensions turn, more than the indexer's head_dim={indexer and indexer.head_dim}; "
            f"use rotary_dim={indexer and indexer.head_dim // 2 * 2} at most",
        )

    @property
    def indexer(self) -> EntryIndexerConfig | None:
        return None if self.compression is None else self.compression.indexer

    @property
    def rotary_dim(self) -> int:
        """How many dimensions turn, the last ones."""
        return self.rope.turning(self.head_dim)

    @property
    def entry_sizes(self) -> tuple[int, ...]:
        """The numbers of each kind of entry: those that are attended to, and the indexer's keys."""
        if self.compression is None:
            return ()
        return (self.head_dim,) if self.indexer is None else (self.head_dim, self.indexer.head_dim)

    def tensors(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        """Sinks, projections, norms, compressor and indexer of one layer, in the order of its state_dict."""
        query_size = self.num_heads * self.head_dim
        output_size = self.output_groups * self.output_rank
        yield TensorSpec(f"{prefix}.sinks", (self.num_heads,), "attention", dtype="float32")
        yield TensorSpec(f"{prefix}.q_a_proj.weight", (self.query_rank, hidden_size), "attention")
        yield TensorSpec(f"{prefix}.q_a_norm.weight", (self.query_rank,), "norm")
        yield TensorSpec(f"{prefix}.q_b_proj.weight", (query_size, self.query_rank), "attention")
        yield TensorSpec(f"{prefix}.kv_proj.weight", (self.head_dim, hidden_size), "attention")
        yield TensorSpec(f"{prefix}.kv_norm.weight", (self.head_dim,), "norm")
        yield TensorSpec(f"{prefix}.o_a_proj.weight", (output_size, query_size // self.output_groups), "attention")
        yield TensorSpec(f"{prefix}.o_b_proj.weight", (hidden_size, output_size), "attention")
        if self.compression is not None:
            yield from self.compression.tensors(prefix, self.head_dim, hidden_size, self.query_rank)

    def state(self) -> StateSpec:
        """The last `window` tokens, an entry for each compressed window, and the tokens of windows not yet full."""
        spec = StateSpec(
            kind="compressed",
            elements_per_token=self.head_dim,
            window=self.window,
            can_rollback=False,
            can_share_prefix=False,
        )
        if self.compression is None:
            return spec
        return replace(
            spec,
            ratio=self.compression.ratio,
            elements_per_entry=sum(self.entry_sizes),
            pending=self.compression.pending,
            elements_per_pending=sum(map(self.compression.source_size, self.entry_sizes)),
        )

    def score_flops(self, context_length: int) -> int:
        """FLOPs of one token's scores and weighted values over `context_length` tokens, and of choosing entries."""
        attending, visible = 4 * self.num_heads * self.head_dim, min(context_length, self.window)
        if self.compression is None:
            return attending * visible
        entries = context_length // self.compression.ratio
        if self.indexer is None:
            return attending * (visible + entries)
        choosing = 2 * self.indexer.num_heads * (self.indexer.head_dim + 1) * entries
        return attending * (visible + min(entries, self.indexer.top_k)) + choosing
