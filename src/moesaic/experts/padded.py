"""Rows in a shape that does not depend on the load: C rows an expert, zeros where there are fewer.

T tokens, R rows sorted by expert, E experts, C slots, D hidden, P = E * C places.
"""

import torch
from torch import Tensor

from moesaic.experts.dispatch import RowFunction, combine, gather
from moesaic.routing import Rows


def compute(experts: RowFunction, x_TD: Tensor, rows: Rows, slots: int) -> Tensor:
    """What `dispatch.compute` gives, from experts that see `slots` rows each.

    Empty slots hold zeros; nobody reads what experts make of them, and no gradient comes from them. `slots` must be at
    least the rows of any expert.
    """
    assert rows.num_experts == 0 or int(rows.counts_E.max()) <= slots
    places_R = _places(rows, slots)
    x_RD = gather(x_TD, rows)
    x_PD = x_RD.new_zeros(rows.num_experts * slots, x_RD.shape[1]).index_copy(0, places_R, x_RD)
    offsets = torch.arange(rows.num_experts + 1) * slots
    return combine(experts(x_PD, offsets).index_select(0, places_R), rows)


def _places(rows: Rows, slots: int) -> Tensor:
    """Where each row stands: its expert's first place, and its number among the expert's rows."""
    shift_E = torch.arange(rows.num_experts) * slots - rows.expert_offsets[:-1]
    shift_R = shift_E.to(rows.token_ids_R.device)[rows.expert_ids_R]
    return torch.arange(rows.token_ids_R.numel(), device=shift_R.device) + shift_R
