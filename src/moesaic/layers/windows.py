"""Windows of `ratio` tokens in a row: which are full, which tokens are in them, and what new tokens see.

B batch, S new tokens, N tokens at hand (kept ones, then new ones), M windows, r tokens in each.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where new tokens stand.

    positions_BS: in their documents; -1: padding. documents_BS: the numbers of these; None when each row is one.
    Both are [1, S] where all rows are alike.
    """

    positions_BS: Tensor
    documents_BS: Tensor | None = None

    def sees_tokens(self, positions_BN: Tensor, window: int) -> Tensor:
        """Which tokens at hand, the last of them the new ones, each new one sees, bool [B, S, N].

        Padding sees itself: a row without any visible slot would turn into NaN and spread.
        """
        num_new, num_slots = self.positions_BS.shape[1], positions_BN.shape[1]
        ahead_BSN = self.positions_BS[:, :, None] - positions_BN[:, None, :]
        seen_BSN = (ahead_BSN >= 0) & (ahead_BSN < window) & (positions_BN >= 0)[:, None, :]
        if self.documents_BS is not None:
            seen_BSN = seen_BSN & (self.documents_BS[:, :, None] == self.documents_BS[:, None, :])
        slots_N = torch.arange(num_slots, device=positions_BN.device)
        itself_SN = slots_N == slots_N[num_slots - num_new :, None]
        return seen_BSN | itself_SN

    def sees_windows(self, numbers_BM: Tensor, ratio: int, documents_BM: Tensor | None = None) -> Tensor:
        """Which windows, by their numbers in their documents, are full for each new token, bool [B, S, M]."""
        full_BS = (self.positions_BS + 1) // ratio
        seen_BSM = numbers_BM[:, None, :] < full_BS[:, :, None]
        if self.documents_BS is None or documents_BM is None:
            return seen_BSM
        return seen_BSM & (self.documents_BS[:, :, None] == documents_BM[:, None, :])


class Windows(NamedTuple):
    """Full windows, row by row in order; rows with fewer than others are filled up, which real_BM is false for.

    slots_BMr: which of the tokens at hand are in them; before_BMr: in the windows before those. numbers_BM: which
    window of its document each is, counted from 0. documents_BM: the number of that document, as in Places.
    """

    slots_BMr: Tensor
    before_BMr: Tensor
    numbers_BM: Tensor
    documents_BM: Tensor | None
    real_BM: Tensor


def full_windows(positions_BN: Tensor, ratio: int, num_new: int, documents_BN: Tensor | None = None) -> Windows:
    """The windows that one of the last `num_new` slots fills.

    positions_BN: of the tokens at hand in their documents; -1: no token. All tokens of such a window must be there.
    """
    order_BN = in_order(positions_BN)
    ordered_BN = positions_BN.gather(1, order_BN)
    is_new_BN = order_BN >= positions_BN.shape[1] - num_new
    fills_BN = is_new_BN & (ordered_BN >= 0) & ((ordered_BN + 1) % ratio == 0)
    most = int(fills_BN.sum(1).max())
    last_BM = fills_BN.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    steps_r = torch.arange(1 - ratio, 1, device=positions_BN.device)

    def slots(ends_BM: Tensor) -> Tensor:
        places_BMr = (ends_BM[:, :, None] + steps_r).clamp(min=0)
        return order_BN.gather(1, places_BMr.flatten(1)).view_as(places_BMr)

    return Windows(
        slots_BMr=slots(last_BM),
        before_BMr=slots(last_BM - ratio),
        numbers_BM=ordered_BN.gather(1, last_BM).clamp(min=0) // ratio,
        documents_BM=None if documents_BN is None else documents_BN.gather(1, order_BN.gather(1, last_BM)),
        real_BM=fills_BN.gather(1, last_BM),
    )


def in_order(positions_BN: Tensor) -> Tensor:
    """The slots of each row, those without a token (position -1) in front, int64 [B, N]."""
    return (positions_BN >= 0).byte().argsort(dim=1, stable=True)


def take(x_BNC: Tensor, slots_BM: Tensor) -> Tensor:
    """x[b, slots[b, m]], [B, M, C]; one row of slots serves all."""
    if slots_BM.shape[0] == 1:
        return x_BNC.index_select(1, slots_BM[0])
    starts_B1 = torch.arange(len(slots_BM), device=slots_BM.device)[:, None] * x_BNC.shape[1]
    return x_BNC.flatten(0, 1).index_select(0, (slots_BM + starts_B1).flatten()).unflatten(0, slots_BM.shape)
