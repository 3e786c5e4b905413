"""From tokens to rows and back: the seam that expert parallelism replaces.

T tokens, R rows sorted by expert, D hidden.
"""

from typing import Protocol

import torch
from torch import Tensor

from moesaic.kernels import ops
from moesaic.routing import Rows


class RowFunction(Protocol):
    """The inner seam: rows sorted by expert in, rows in the same order out. `expert_offsets` is int64 [E+1], CPU."""

    def __call__(self, x_RD: Tensor, expert_offsets: Tensor) -> Tensor: ...


def gather(x_TD: Tensor, rows: Rows) -> Tensor:
    """x_RD: the input of each row, times its weight where the weight goes on the input."""
    x_RD = ops.gather_rows(x_TD, rows.token_ids_R, *rows.by_token)
    if rows.weight_on == "input":
        x_RD = x_RD * rows.weights_R[:, None].to(x_RD.dtype)
    return x_RD


def combine(out_RD: Tensor, rows: Rows) -> Tensor:
    """y_TD: each token's rows, weighted and summed in the order of its choices; zeros for tokens without rows."""
    weights_R = rows.weights_R if rows.weight_on == "output" else torch.ones_like(rows.weights_R)
    return ops.combine_rows(out_RD, weights_R, *rows.by_token, rows.token_ids_R)


def compute(experts: RowFunction, x_TD: Tensor, rows: Rows) -> Tensor:
    """The outer seam by its default way: gather, the experts' own forward, combine."""
    return combine(experts(gather(x_TD, rows), rows.expert_offsets), rows)
