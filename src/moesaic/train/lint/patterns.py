"""The routing that experiments dictate. B rows, S columns, E experts, K choices a token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.train.lint.report import NotMeasured
from moesaic.train.lint.stand import Logits, Stand, falling

MILD = 2.0
UNDER = 0.9  # of the mean load


def lopsided(num_experts: int, apart: int = 1, real_columns: int | None = None) -> Logits:
    """Three of four tokens prefer the same experts, mildly, so that balance losses pull; the fourth others.

    apart: how far the others are. Columns from `real_columns` on, which are padding, prefer a third kind.
    """

    def logits(_: int, rows: int, columns: int) -> Tensor:
        column_S = torch.arange(columns)
        first_S = torch.where(column_S % 4 < 3, 0, apart)
        if real_columns is not None:
            first_S[column_S >= real_columns] = 2 * apart
        kinds = torch.stack([falling(num_experts, int(first)) for first in first_S])
        return MILD * kinds.expand(rows, -1, -1)

    return logits


def in_turn(num_experts: int, start: int = 0) -> Logits:
    """Token t prefers expert `start` + t, mildly: all experts alike."""

    def logits(_: int, rows: int, columns: int) -> Tensor:
        first_T = torch.arange(rows * columns) + start
        kinds = torch.stack([falling(num_experts, int(first) % num_experts) for first in first_T])
        return MILD * kinds.view(rows, columns, num_experts)

    return logits


def dealt(stand: Stand, counts: Sequence[int]) -> Logits:
    """counts[i] tokens choose the experts that `stand.chosen(i)` names, steeply; the same in every layer."""
    kinds = [stand.steep(stand.chosen(first)) for first, count in enumerate(counts) for _ in range(count)]

    def logits(_: int, rows: int, columns: int) -> Tensor:
        return torch.stack(kinds).view(rows, columns, -1)

    return logits


def collapsed(stand: Stand, firsts: Sequence[int]) -> Logits:
    """All tokens of layer l choose the experts that begin with firsts[l]."""

    def logits(index: int, rows: int, columns: int) -> Tensor:
        return stand.steep(stand.chosen(firsts[index])).expand(rows, columns, -1)

    return logits


def loads(stand: Stand, counts: Sequence[int]) -> Tensor:
    """How many tokens each expert gets by `dealt`, fp64 [E]."""
    load_E = torch.zeros(stand.num_experts, dtype=torch.float64)
    for first, count in enumerate(counts):
        if count:
            load_E[list(stand.chosen(first))] += count
    return load_E


def graded(stand: Stand, heavy: float) -> list[int]:
    """Tokens by kind: one kind whose experts are a little under-loaded; of the others `heavy` are of one kind.

    Counted before any dropping the second kind's experts have less than the mean; counted after it they have more,
    since what the first ones lost lowers the mean. Raises NotMeasured for a batch too small for that, and where a token
    gets so many of the experts that none can stand out.
    """
    total, top_k, experts = stand.num_tokens, stand.top_k, stand.num_experts
    share = UNDER * top_k / experts
    if heavy * (1 - share) <= share:
        raise NotMeasured(
            f"a token gets {top_k} of {experts} experts, too many for some to stand out; build it with more experts"
        )
    second = int(share * total)
    first = int(heavy * (total - second))
    if second < 2 or first <= second:
        raise NotMeasured(
            f"a micro-batch of {total} tokens is too small to load {experts} experts unevenly; give "
            f"{3 * experts // top_k + 1} tokens or more"
        )
    counts = [0] * experts
    counts[0], counts[top_k % experts] = first, second
    others = [*range(2 * top_k, experts), 0]  # which share no expert with the second kind
    for i in range(total - first - second):
        counts[others[i % len(others)]] += 1
    return counts
