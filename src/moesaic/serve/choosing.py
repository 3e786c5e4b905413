"""From rows of logits to the tokens of requests, each by its own rules, the same whatever else is in the step.

N rows, V vocab.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.engine.sampling import likeliest
from moesaic.serve.request import TokenInfo
from moesaic.serve.writing import Writing


class Row:
    """A row of logits: what is to follow the tokens of a text, drafts behind its newest included."""

    def __init__(self, writing: Writing, drafts: Sequence[int] = ()) -> None:
        self.writing, self.drafts = writing, drafts


def choose(logits_NV: Tensor, rows: Sequence[Row]) -> list[TokenInfo]:
    """The token of each row."""
    tokens = likeliest(logits_NV).tolist()
    found = []
    for token, row, logits_V in zip(tokens, rows, logits_NV, strict=True):
        count = row.writing.request.top_logprobs
        found.append(TokenInfo(token) if count is None else scored(logits_V, token, count))
    return found


def scored(logits_V: Tensor, token_id: int, count: int) -> TokenInfo:
    """A token with its log probability under the model, and those of the `count` likeliest."""
    logprobs_V = torch.log_softmax(logits_V.float(), -1)
    values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenInfo(token_id, float(logprobs_V[token_id]), top)
