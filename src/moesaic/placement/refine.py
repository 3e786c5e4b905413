"""Evens a placement out by exchanging slots. P slots, G ranks, S slots a rank; one layer of one node at a time."""

import numpy as np

from moesaic.placement.placed import Floats, Ints

EXCHANGES_PER_SLOT = 4
"""Where to stop: recorded loads need fewer than one exchange a slot."""


def refine(slot_loads_P: Floats, num_ranks: int) -> Ints:
    """The order in which slots should stand, [P]: each exchange lightens the heaviest rank, none makes it heavier.

    Of all exchanges with the heaviest rank the one is made that leaves the heavier of both ranks lightest; it ends when
    none helps. Every rank keeps its number of slots.
    """
    slot_GS = np.arange(len(slot_loads_P)).reshape(num_ranks, -1)
    load_GS = slot_loads_P.reshape(num_ranks, -1).copy()
    for _ in range(EXCHANGES_PER_SLOT * len(slot_loads_P)):
        total_G = load_GS.sum(axis=1)
        heaviest = int(total_G.argmax())
        gain_SGS = load_GS[heaviest][:, None, None] - load_GS
        left_SGS = np.maximum(total_G[heaviest] - gain_SGS, total_G[:, None] + gain_SGS)
        left_SGS[:, heaviest] = np.inf
        own, other, place = np.unravel_index(int(left_SGS.argmin()), left_SGS.shape)
        if left_SGS[own, other, place] >= total_G[heaviest] * (1 - 1e-12):
            break
        for table in (slot_GS, load_GS):
            table[heaviest, own], table[other, place] = table[other, place], table[heaviest, own]
    return slot_GS.reshape(-1)
