"""Aligning the parts of two translations by their lengths alone: long parts become long ones.

Source: Gale and Church 1993, "A Program for Aligning Sentences in Bilingual Corpora" (aclanthology.org/J93-1004),
sections 3 and 4: their variance, their chances of how parts are matched, and dynamic programming.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

VARIANCE = 6.8  # of the length of a translation, for each character of what is translated

# How many parts of the one text become how many of the other, and how often: the paper's table 5.
_CHANCES = {(1, 1): 0.89, (1, 0): 0.00495, (0, 1): 0.00495, (2, 1): 0.0445, (1, 2): 0.0445, (2, 2): 0.011}


class Bead(NamedTuple):
    """Parts that belong together: from `first` to before `end` in the one text, and so in the other."""

    first: int
    end: int
    other_first: int
    other_end: int


def align_lengths(lengths: Sequence[int], other: Sequence[int], ratio: float) -> list[Bead]:
    """The likeliest alignment of parts of these lengths, in order; every part is in one bead.

    ratio: how much longer the other text is as a whole.
    """
    sums = [0, *itertools.accumulate(lengths)]
    other_sums = [0, *itertools.accumulate(length / ratio for length in other)]
    best: dict[tuple[int, int], tuple[float, tuple[int, int]]] = {(0, 0): (0.0, (0, 0))}
    for place in itertools.product(range(len(lengths) + 1), range(len(other) + 1)):
        if place == (0, 0):
            continue
        i, j = place
        costs = [
            (best[i - n, j - m][0] + _cost(sums[i] - sums[i - n], other_sums[j] - other_sums[j - m], chance), (n, m))
            for (n, m), chance in _CHANCES.items()
            if n <= i and m <= j
        ]
        best[place] = min(costs)
    return _way_back(best, len(lengths), len(other))


def deviation(length: float, other_length: float) -> float:
    """How unlikely two lengths (brought to one scale) are for a text and its translation, in standard deviations."""
    mean = (length + other_length) / 2
    return abs(length - other_length) / math.sqrt(VARIANCE * mean) if mean else 0.0


def _cost(length: float, other_length: float, chance: float) -> float:
    """-log of the chance of the match and of a deviation at least as large."""
    tail = math.erfc(deviation(length, other_length) / math.sqrt(2))
    return -math.log(max(tail, 1e-300)) - math.log(chance)


def _way_back(
    best: dict[tuple[int, int], tuple[float, tuple[int, int]]], num_parts: int, num_others: int
) -> list[Bead]:
    beads, i, j = [], num_parts, num_others
    while i or j:
        n, m = best[i, j][1]
        beads.append(Bead(i - n, i, j - m, j))
        i, j = i - n, j - m
    return beads[::-1]
