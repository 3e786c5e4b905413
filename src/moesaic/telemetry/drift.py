"""How a router changes: between checkpoints, from step to step, and under rounding and noise. Pure numpy.

E experts, K choices a token, T tokens, M columns of choices, W windows.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moesaic.telemetry.health import load_shares
from moesaic.telemetry.likeness import chosen
from moesaic.telemetry.load import LayerLoad

LARGE_LOGITS = 30.0  # root mean square; softmax is then a step function: nothing is left to learn from
FLIPS = 0.05  # of the choices that rounding to bf16 changes
SWING = 0.25  # of the rows that change experts from window to window, beyond what chance gives


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """How many choices two checkpoints share on the same tokens. chance: what independent choices would share."""

    share: float
    chance: float
    num_tokens: int


def saturation(earlier_TM: ArrayLike, later_TM: ArrayLike, num_experts: int) -> Saturation:
    """Router saturation: mean over tokens of |E_t and E'_t| / |E'_t| (OLMoE, arXiv:2409.02060, sec. 5.1).

    Both are the choices of the same tokens, -1 where there is none. Tokens without a later choice do not count; the
    share is NaN without any. The chance takes both checkpoints' loads as they are: K/E where they are even.
    """
    earlier_TE, later_TE = chosen(earlier_TM, num_experts), chosen(later_TM, num_experts)
    counts_T = later_TE.sum(axis=1)
    is_routed_T = counts_T > 0
    if not is_routed_T.any():
        return Saturation(share=math.nan, chance=math.nan, num_tokens=0)
    earlier_TE, later_TE, counts_T = earlier_TE[is_routed_T], later_TE[is_routed_T], counts_T[is_routed_T]
    share = float(((earlier_TE & later_TE).sum(axis=1) / counts_T).mean())
    chance = float((earlier_TE.mean(0) * (later_TE / counts_T[:, None]).mean(0)).sum())
    return Saturation(share=share, chance=chance, num_tokens=len(counts_T))


def load_distance(counts_E: ArrayLike, other_E: ArrayLike) -> float:
    """The part of the rows that would have to change experts to turn one load into the other: total variation, 0 to 1.

    NaN where one of them has no rows.
    """
    one, other = load_shares(counts_E), load_shares(other_E)
    return float(np.abs(one - other).sum() / 2) if one.any() and other.any() else math.nan


def load_swing(counts_WE: ArrayLike) -> float:
    """How far the load moves from window to window beyond chance: the mean distance of neighbours, less what two draws
    of so many rows from the mean load show on average; not below 0. NaN of fewer than two windows.

    Expected of chance: sum_e sqrt(p_e (1 - p_e) (1/n + 1/n') / (2 pi)), normal approximation.
    """
    counts = np.asarray(counts_WE, dtype=np.float64)
    counts = counts[counts.sum(1) > 0]
    if len(counts) < 2:
        return math.nan
    share_E, rows_W = load_shares(counts.sum(0)), counts.sum(1)
    spread = np.sqrt(share_E * (1 - share_E) / (2 * math.pi)).sum()
    beyond = [
        load_distance(before, after) - spread * math.sqrt(1 / n + 1 / m)
        for before, after, n, m in zip(counts, counts[1:], rows_W, rows_W[1:], strict=False)
    ]
    return max(0.0, float(np.mean(beyond)))


@dataclass(frozen=True, kw_only=True)
class RouterState:
    """Whether one layer's router is steady; `reasons` says in words why not."""

    layer: int
    logit_rms: float
    flips_bf16: float
    swing: float
    reasons: tuple[str, ...]

    @property
    def is_unstable(self) -> bool:
        """Whether there is any reason."""
        return bool(self.reasons)


def router_state(load: LayerLoad, counts_WE: ArrayLike = ()) -> RouterState:
    """Judge a window of one layer: its logits' scale, choices that hang on rounding, and loads that swing.

    counts_WE: the loads of the parts of the window, oldest first (steps, or a few of them together).
    """
    counts = np.asarray(counts_WE, dtype=np.float64)
    swing = load_swing(counts) if counts.ndim == 2 else math.nan
    reasons = []
    rms, flips = (load.logits.rms, load.logits.flips_bf16) if load.logits is not None else (math.nan, math.nan)
    if rms > LARGE_LOGITS:
        reasons.append(f"router logits of {rms:.0f} (root mean square) leave the softmax no gradient")
    if flips > FLIPS:
        reasons.append(f"{flips:.0%} of the choices change when logits are rounded to bf16")
    if swing > SWING:
        reasons.append(f"{swing:.0%} of the rows change experts from window to window, beyond chance")
    return RouterState(layer=load.layer, logit_rms=rms, flips_bf16=flips, swing=swing, reasons=tuple(reasons))
