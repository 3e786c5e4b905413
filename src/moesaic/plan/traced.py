"""Routing as a recorded trace has it: batches are drawn from its tokens, and their experts counted."""

from pathlib import Path

import numpy as np

from moesaic.config import ModelConfig, MoeConfig
from moesaic.errors import TraceError
from moesaic.plan.routing import Shares, from_counts
from moesaic.trace.fingerprint import Fingerprint
from moesaic.trace.reader import Trace

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_DRAWS = 16


class Traced:
    """See routing.Routing. A batch is one token each of many places of the trace, as when many texts are written.

    Raises TraceError for a trace of another model, and for one without tokens.
    """

    def __init__(self, trace: Trace, config: ModelConfig) -> None:
        trace.require(Fingerprint.of(config)).require_tokens()
        self.name = f"trace {Path(trace.path).name}"
        generator = np.random.default_rng(0)
        tokens_N = np.flatnonzero(trace.token_facts["mask"])
        self._tables = {layer: _distinct_table(trace, layer, tokens_N, generator) for layer in trace.layers}
        self._shares: dict[int, Shares] = {}
        for layer in trace.layers:
            moe = config.layers[layer].feed_forward
            assert isinstance(moe, MoeConfig), "the fingerprint says so"
            self._shares[layer] = from_counts(_counts(trace, layer, tokens_N, moe)[None], moe.router.top_k)

    def distinct(self, moe: MoeConfig, layer: int, num_tokens: float) -> float:
        """Interpolated between batches that were drawn; beyond the largest of them by the shares."""
        batches, counts = self._tables[layer]
        if num_tokens <= batches[-1]:
            return float(np.interp(num_tokens, batches, counts))
        return max(float(counts[-1]), self._shares[layer].distinct(moe, 0, num_tokens))

    def imbalance(self, moe: MoeConfig, layer: int, ranks: int, num_tokens: float) -> float:
        return self._shares[layer].imbalance(moe, 0, ranks, num_tokens)


def open_routing(path: str, config: ModelConfig) -> Traced:
    """The routing of a trace file. Raises TraceError for a file that is none, or of another model."""
    if not Path(path).is_file():
        raise TraceError(f"there is no trace {path}; record one with `moesaic trace MODEL --out {path}`")
    return Traced(Trace.open(path), config)


def _counts(trace: Trace, layer: int, tokens_N: np.ndarray, moe: MoeConfig) -> np.ndarray:
    """Rows of each expert, [E], without those of padding."""
    if len(tokens_N) == trace.num_tokens:
        return trace.counts(layer)
    rows = trace.rows(layer)
    is_token_T = np.zeros(trace.num_tokens, bool)
    is_token_T[tokens_N] = True
    of_tokens_R = np.repeat(is_token_T, np.diff(rows.row_offsets))
    return np.bincount(rows.expert_ids_R[of_tokens_R], minlength=moe.num_experts)


def _distinct_table(
    trace: Trace, layer: int, tokens_N: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Batch sizes, and the mean number of experts that so many tokens chose between them."""
    rows = trace.rows(layer)
    batches = [size for size in _BATCHES if size <= max(1, len(tokens_N))]
    counts = []
    for size in batches:
        draws = (generator.choice(tokens_N, size, replace=False) for _ in range(_DRAWS))
        counts.append(np.mean([_distinct(rows.row_offsets, rows.expert_ids_R, draw) for draw in draws]))
    return np.array(batches, dtype=float), np.array(counts)


def _distinct(row_offsets: np.ndarray, expert_ids_R: np.ndarray, tokens: np.ndarray) -> int:
    chosen = [expert_ids_R[row_offsets[token] : row_offsets[token + 1]] for token in tokens]
    return len(np.unique(np.concatenate(chosen)))
