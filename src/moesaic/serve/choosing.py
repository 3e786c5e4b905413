"""From rows of logits to the tokens of requests, each by its own rules, the same whatever else is in the step.

N rows, V vocab.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from moesaic.serve.drawing import draw, random_number
from moesaic.serve.request import TokenInfo
from moesaic.serve.writing import Writing

LEAST_LOGPROB = -9999.0  # stands for anything below, as in vLLM: JSON has no infinite numbers


class Row:
    """A row of logits: what is to follow the tokens of a text, drafts behind its newest included."""

    def __init__(self, writing: Writing, drafts: Sequence[int] = ()) -> None:
        self.writing, self.drafts = writing, drafts


def choose(logits_NV: Tensor, rows: Sequence[Row]) -> list[TokenInfo]:
    """The token of each row, by the rules of its request and a random number of its seed and its place in the text."""
    return [_choose(logits_V, row) for logits_V, row in zip(logits_NV.numpy(), rows, strict=True)]


def chosen_id(logits_V: np.ndarray, row: Row) -> int:
    """The token of a row alone."""
    writing = row.writing
    rules = writing.rules
    changed_V = rules.apply(logits_V, writing.token_ids, row.drafts)
    if writing.guide is not None:
        changed_V = _guided(changed_V, logits_V, writing.guide.allowed(row.drafts))
    if rules.sampling.temperature == 0:
        return int(changed_V.argmax())
    assert rules.sampling.seed is not None
    place = len(writing.token_ids) + len(row.drafts)
    return draw(changed_V, rules.sampling, random_number(rules.sampling.seed, place))


def _choose(logits_V: np.ndarray, row: Row) -> TokenInfo:
    token, count = chosen_id(logits_V, row), row.writing.request.top_logprobs
    return TokenInfo(token) if count is None else scored(logits_V, token, count)


def _guided(changed_V: np.ndarray, logits_V: np.ndarray, allowed_V: np.ndarray) -> np.ndarray:
    """Only what a grammar allows. Where that is but an end that is too early, the end; where it is nothing, the text
    has ended, and the token that is chosen will not be taken."""
    for each_V in (changed_V, logits_V):
        left_V = np.where(allowed_V, each_V, np.float32(-np.inf))
        if left_V.max() > -np.inf:
            return left_V
    return changed_V


def scored(logits_V: Tensor | np.ndarray, token_id: int, count: int) -> TokenInfo:
    """A token with its log probability under the model, before any rules, and those of the `count` likeliest."""
    logits_V = np.asarray(logits_V, np.float32)
    greatest = logits_V.max()
    sum_of_all = greatest + np.log(np.exp(logits_V - greatest).sum(dtype=np.float64))
    top_ids = likeliest_ids(logits_V, count)
    logprobs = np.maximum(logits_V[[token_id, *top_ids]].astype(np.float64) - sum_of_all, LEAST_LOGPROB).tolist()
    return TokenInfo(token_id, logprobs[0], tuple(zip(top_ids, logprobs[1:], strict=True)))


def likeliest_ids(logits_V: np.ndarray, count: int) -> list[int]:
    """The likeliest tokens, from the first on; of equally likely ones those with smaller ids."""
    count = min(count, len(logits_V))
    if count == 0:
        return []
    place = len(logits_V) - count
    ids = np.flatnonzero(logits_V >= np.partition(logits_V, place)[place])
    return ids[np.argsort(-logits_V[ids], kind="stable")][:count].tolist()
