"""How fast one step of a model could be: what must be read and computed, over what a machine reads and computes.

B texts of a batch, E experts, K chosen. (Roofline: Williams, Waterman and Patterson, doi:10.1145/1498765.1498785.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from moesaic.config import ModelConfig, MoeConfig
from moesaic.kernels.blocks import Format
from moesaic.kernels.paged import CacheFormat
from moesaic.plan.formats import CACHE_BYTES
from moesaic.tensor_spec import Role

Number = Literal["fp32", "bf16", "int8"]
"""What products are made of: whole numbers of 4 to 8 bits, and MXFP4, meet activations of 8, FP8 those of bf16."""

EXPERTS = "experts"
"""What the engine calls the part that holds routed experts (see engine/lower/feed_forward.py)."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """What an engine holds of a model: bytes of packed matrices by part and what most of them are of, those of an
    embedding's number, what numbers the cache keeps, and what products of experts, of the head and of other matrices
    are made of."""

    config: ModelConfig
    packed_bytes: Mapping[str, int]
    embedding_element_bytes: int
    cache_format: CacheFormat
    of_experts: Number
    of_head: Number
    of_others: Number
    formats: Mapping[str, Format] = field(default_factory=dict)

    def number(self, role: Role) -> Number:
        """What a tensor's products are made of; those of routers are always fp32."""
        by_role: dict[Role, Number] = {"router": "fp32", "experts": self.of_experts, "head": self.of_head}
        return by_role.get(role, self.of_others)


class Work(NamedTuple):
    """Bytes that one step must read at the least, and operations that it must compute, by what they are made of."""

    num_bytes: float
    operations: dict[Number, float]


class Bound(NamedTuple):
    """The least seconds of a step, and which of the two limits sets them."""

    seconds: float
    by: Literal["memory", "arithmetic"]


def distinct_experts(config: ModelConfig, num_tokens: int) -> float:
    """The share of all experts' weights that a step of so many tokens reads, tokens choosing evenly and freely.

    1 - (1 - K/E)^B of a layer's experts are chosen by at least one of B tokens.
    """
    read = held = 0.0
    for layer in config.layers:
        if isinstance(layer.feed_forward, MoeConfig):
            moe = layer.feed_forward
            numel = sum(spec.numel for spec in moe.tensors("", config.hidden_size) if spec.top_k_of)
            held += numel
            read += numel * (1 - (1 - moe.router.top_k / moe.num_experts) ** num_tokens)
    return read / held if held else 1.0


def decode_work(held: Held, batch: int, context: float) -> Work:
    """One more token for each of `batch` texts of `context` tokens."""
    return _work(held, batch, outputs=batch, states=batch * held.config.state_bytes(round(context), 1), seen=context)


def prefill_work(held: Held, num_tokens: int) -> Work:
    """A prompt's tokens at once, of which only the last is asked for logits; a token sees half of them on average."""
    return _work(held, num_tokens, outputs=1, states=held.config.state_bytes(num_tokens, 1), seen=num_tokens / 2)


def _work(held: Held, num_tokens: int, *, outputs: int, states: int, seen: float) -> Work:
    config = held.config
    num_bytes = sum(
        size * (distinct_experts(config, num_tokens) if part == EXPERTS else 1.0)
        for part, size in held.packed_bytes.items()
    )
    num_bytes += (
        num_tokens * config.hidden_size * held.embedding_element_bytes + states * CACHE_BYTES[held.cache_format]
    )
    operations: dict[Number, float] = dict.fromkeys(("fp32", "bf16", "int8"), 0.0)
    for spec in config.parameters():
        if len(spec.shape) > 1 and spec.role not in ("embedding", "norm"):
            times = outputs if spec.role == "head" else num_tokens
            operations[held.number(spec.role)] += 2.0 * spec.active_numel * times
    if config.tie_word_embeddings:
        operations[held.of_head] += 2.0 * config.vocab_size * config.hidden_size * outputs
    operations["fp32"] += float(config.decoder.score_flops(round(seen))) * num_tokens
    return Work(num_bytes, operations)


def bound(work: Work, bandwidth: float, peaks: Mapping[Number, float | None]) -> Bound:
    """The slower of reading and computing, each at its best. bandwidth: bytes a second; peaks: operations a second."""
    reading = work.num_bytes / bandwidth
    computing = sum(count / best_peak(number, peaks) for number, count in work.operations.items() if count)
    return Bound(computing, "arithmetic") if computing > reading else Bound(reading, "memory")


def best_peak(number: Number, peaks: Mapping[Number, float | None]) -> float:
    """That of the numbers themselves, or of wider ones where a machine computes these faster."""
    order: tuple[Number, ...] = ("int8", "bf16", "fp32")
    wide_enough = (peaks.get(each) for each in order[order.index(number) :])
    return max(peak for peak in wide_enough if peak is not None)
