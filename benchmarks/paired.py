"""Ratios of pairs of short blocks, which the machine's moods hit alike, and what they say together.

Without any cost the logarithm of a pair's ratio is as often positive as negative and of the same size, if which of a
pair comes first is drawn. Its centre is estimated by the median of all means of two (Hodges and Lehmann), and the
interval that holds the true one with 95% by Wilcoxon's signed ranks, narrower than that of a plain median.
"""

import math
from collections.abc import Sequence

import numpy as np


def cost(ratios: Sequence[float]) -> dict[str, float]:
    """The centre of ratios less 1 (`overhead`), and between what it lies with 95% (`low`, `high`)."""
    logs, n = np.log(ratios), len(ratios)
    means = np.sort(np.add.outer(logs, logs)[np.triu_indices(n)] / 2)
    reach = 1.96 * math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    low = max(0, math.floor((len(means) - 1) / 2 - reach))
    ends = means[low], means[len(means) - 1 - low]
    return {
        "overhead": math.expm1(np.median(means)),
        "low": math.expm1(ends[0]),
        "high": math.expm1(ends[1]),
    }


def interval(found: dict[str, float]) -> str:
    """What `cost` has found."""
    return f"{found['overhead']:+.2%} ({found['low']:+.2%} to {found['high']:+.2%})"


def verdict(found: dict[str, float], most: float) -> str:
    """Whether it is shown that the cost is at most so much."""
    return "shown" if found["high"] <= most else "not shown" if found["low"] <= most else "NO"
