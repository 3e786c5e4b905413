"""One token drawn from a row of logits by one random number: the same token wherever and beside whatever it runs.

Weights are exp((logit - greatest) / temperature) in fp32, their sums fp64, and the random number says how far to go
along them, in the order of token ids. numpy only: torch's operations wake threads of their own, which then look for
work for a while on the processors that the engine's threads need.

V vocab, N tokens that are left.
"""

from typing import NamedTuple

import numpy as np

from moesaic.engine.sampling import Sampling

_BLOCK = 64  # weights summed at once where all of them are
_STEEPEST = 1e30  # 1 / temperature; times a difference of 0 it is still 0


class Left(NamedTuple):
    """The tokens that may be drawn, in the order of their ids, and their weights. ids_N: None: all there are."""

    ids_N: np.ndarray | None
    weights_N: np.ndarray

    def only(self, kept_N: np.ndarray) -> "Left":
        """kept_N: whether each is kept."""
        places = np.flatnonzero(kept_N)
        return Left(places if self.ids_N is None else self.ids_N[places], self.weights_N[places])


def random_number(seed: int, position: int) -> float:
    """At least 0 and below 1, the same for the same seed and place of a token in its text.

    Philox4x64-10: its block at `position` is found without those before (Salmon and others, Parallel random numbers: as
    easy as 1, 2, 3, 2011).
    """
    bits = np.random.Philox(key=seed % 2**64, counter=position).random_raw()
    return int(bits >> 11) * 2.0**-53


def draw(logits_V: np.ndarray, sampling: Sampling, number: float) -> int:
    """A token by temperature, top_k, top_p and min_p, at `number` of the way through what they leave.

    logits_V: fp32; at least one is finite, the others may be -inf. number: at least 0, below 1.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    left = _likeliest_k(logits_V, sampling)
    if sampling.top_p is not None and sampling.top_p < 1:
        left = _greatest_share(left, sampling.top_p)
    if sampling.min_p:
        left = left.only(left.weights_N >= sampling.min_p)  # the likeliest weighs 1
    if left.ids_N is None:
        return _place_by_blocks(left.weights_N, number)
    return int(left.ids_N[_place(left.weights_N.astype(np.float64), number)])


def draw_by_sorting(logits_V: np.ndarray, sampling: Sampling, number: float) -> int:
    """What `draw` gives, by sorting all there is: slow, and its definition."""
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


def _likeliest_k(logits_V: np.ndarray, sampling: Sampling) -> Left:
    if sampling.top_k is None or sampling.top_k >= len(logits_V):
        return Left(None, _weights(logits_V, sampling.temperature))
    place = len(logits_V) - sampling.top_k
    ids_N = np.flatnonzero(logits_V >= np.partition(logits_V, place)[place])
    return Left(ids_N, _weights(logits_V[ids_N], sampling.temperature))


def _greatest_share(left: Left, share: float) -> Left:
    """Those with the greatest weights that together reach this share of all; of equal ones the first.

    All tokens below the bound together weigh less than what may be left out: only the others are sorted.
    """
    wanted = share * left.weights_N.sum(dtype=np.float64)
    bound = 0.999 * (1 - share) / share * wanted / len(left.weights_N)
    some = left.only(left.weights_N >= bound)
    greatest = np.sort(some.weights_N)[::-1]
    ends = np.cumsum(greatest.astype(np.float64))
    if ends[-1] < wanted:  # by rounding, where hardly anything is to be left out
        return left
    count = int(np.searchsorted(ends, wanted)) + 1
    kept_N = some.weights_N >= greatest[count - 1]
    surplus = int(np.count_nonzero(kept_N)) - count
    if surplus:
        kept_N[np.flatnonzero(some.weights_N == greatest[count - 1])[-surplus:]] = False
    return some.only(kept_N)


def _place(weights_N: np.ndarray, number: float) -> int:
    """Of the first token at whose end more than `number` of all weight has gone by. weights_N: fp64."""
    ends_N = np.cumsum(weights_N)
    return int(np.searchsorted(ends_N, _short_of(number * ends_N[-1], ends_N[-1]), side="right"))


def _place_by_blocks(weights_V: np.ndarray, number: float) -> int:
    """The same, of many: first its block, then the place in it. weights_V: fp32."""
    ends = np.cumsum(np.add.reduceat(weights_V, np.arange(0, len(weights_V), _BLOCK), dtype=np.float64))
    wanted = _short_of(number * ends[-1], ends[-1])
    block = int(np.searchsorted(ends, wanted, side="right"))
    ends_within = np.cumsum(weights_V[block * _BLOCK : (block + 1) * _BLOCK].astype(np.float64))
    wanted -= ends[block - 1] if block else 0.0
    return block * _BLOCK + int(np.searchsorted(ends_within, _short_of(wanted, ends_within[-1]), side="right"))


def _short_of(wanted: float, end: float) -> float:
    """Below the end: a number just below 1 can be rounded up to it."""
    return min(wanted, float(np.nextafter(end, 0)))
