"""One token drawn from a row of logits by one random number: the same token wherever and beside whatever it runs.

Weights are exp((logit - greatest) / temperature) in fp32, their sums fp64, and the random number says how far to go
along them, in the order of token ids (csrc/draw.h). On the engine's own threads: torch's operations wake others, which
then look for work for a while on the processors that the engine's need.

V vocab.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moesaic.engine.program import Program
from moesaic.engine.sampling import Sampling
from moesaic.kernels.backend import compiled

_native = compiled()
_WORD = 2**64 - 1
_PHILOX0, _PHILOX1 = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_WEYL0, _WEYL1 = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
NOTHING = -1  # in place of a token: none that is allowed is possible
_STEEPEST = 1e30  # 1 / temperature; times a difference of 0 it is still 0


class Scores(NamedTuple):
    """Log probabilities of a row: of one token; of the likeliest ones, whose ids are beside them."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


def random_number(seed: int, position: int) -> float:
    """At least 0 and below 1, the same for the same seed and place of a token in its text.

    Philox4x64-10: the first word of its block at `position + 1`, where numpy's generator begins, found without those
    before (Salmon and others, Parallel random numbers: as easy as 1, 2, 3, 2011).
    """
    key0, key1 = seed & _WORD, 0
    word0, word1, word2, word3 = position + 1, 0, 0, 0
    for _ in range(10):
        product0, product2 = _PHILOX0 * word0, _PHILOX1 * word2
        word0, word1 = (product2 >> 64) ^ word1 ^ key0, product2 & _WORD
        word2, word3 = (product0 >> 64) ^ word3 ^ key1, product0 & _WORD
        key0, key1 = (key0 + _WEYL0) & _WORD, (key1 + _WEYL1) & _WORD
    return (word0 >> 11) * 2.0**-53


def draw_rows(
    rows_V: Sequence[np.ndarray],
    samplings: Sequence[Sampling],
    numbers: Sequence[float],
    program: Program | None = None,
    masks: Sequence[np.ndarray | None] | None = None,
) -> list[int]:
    """A token of each row by temperature, top_k, top_p and min_p, at its number's way through what they leave.

    rows_V: contiguous fp32; at least one logit of each is finite, the others may be -inf. numbers: at least 0, below 1.
    program: whose threads do it, while it does nothing else; None: this one. masks: of each row, which tokens may be
    drawn, uint8 [V / 8, rounded up], token t's bit t % 8 of byte t // 8; None: all. They change what is drawn as if the
    logits of the others were -inf, and where nothing is left to draw, NOTHING is what is given.
    """
    rules = [
        (each.temperature, each.top_k or 0, each.top_p or 1.0, each.min_p or 0.0, number)
        for each, number in zip(samplings, numbers, strict=True)
    ]
    given = [None] * len(rules) if masks is None else list(masks)
    return _native.draw_rows(list(rows_V), rules, given, program and program.native)


def score_rows(
    rows_V: Sequence[np.ndarray], token_ids: Sequence[int], counts: Sequence[int], program: Program | None = None
) -> list[Scores]:
    """The log probability of each row's token, and of its so many likeliest; of equally likely ones the first."""
    wanted = list(zip(token_ids, counts, strict=True))
    return [Scores(*found) for found in _native.score_rows(list(rows_V), wanted, program and program.native)]


def draw_by_sorting(logits_V: np.ndarray, sampling: Sampling, number: float) -> int:
    """What `draw_rows` gives for a row, by sorting all there is: slow, and its definition."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    weights_V = _weights(logits_V, sampling.temperature)
    order = np.argsort(-weights_V, kind="stable")
    if sampling.top_k is not None and sampling.top_k < len(order):
        least = np.sort(logits_V)[-sampling.top_k]
        order = order[logits_V[order] >= least]
    kept = np.sort(order)
    if sampling.top_p is not None and sampling.top_p < 1:
        wanted = sampling.top_p * weights_V[kept].sum(dtype=np.float64)
        before = np.concatenate([[0.0], np.cumsum(weights_V[order].astype(np.float64))[:-1]])
        order = order[before < wanted]
    kept = np.sort(order[weights_V[order] >= (sampling.min_p or 0)])
    ends = np.cumsum(weights_V[kept].astype(np.float64))
    return int(kept[np.argmax(ends > min(number * ends[-1], np.nextafter(ends[-1], 0)))])


def _weights(logits_V: np.ndarray, temperature: float) -> np.ndarray:
    weights_V = logits_V - logits_V.max()
    with np.errstate(over="ignore"):  # to -inf, of which the weight is 0
        weights_V *= np.float32(min(1 / max(temperature, 1e-300), _STEEPEST))
    return np.exp(weights_V, out=weights_V)
