"""What a router's logits tell: how large they are, and how little would change its choices.

S sampled tokens, T tokens, E experts, M columns of choices.
"""

from functools import lru_cache

import torch
from torch import Tensor

from moesaic.routing import RoutingDecision
from moesaic.telemetry.load import LogitFacts

SAMPLED = 64  # tokens of each forward: choosing again costs too much for all of them
NOISE = 0.01  # standard deviation, of the logits' root mean square


class LogitSums:
    """Adds up what forwards tell, of `SAMPLED` tokens each, evenly spaced. Draws nothing from torch's generators."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # tokens, logits, squares, margins, choices, flips in bf16 and under noise
        self._peak: Tensor | None = None

    @torch.no_grad()
    def add(self, decision: RoutingDecision) -> None:
        """Look at one forward of a layer; routers without logits, or whose tokens compete, tell nothing."""
        num_tokens = decision.logits_TE.shape[0]
        if decision.rechoose is None or not num_tokens:
            return
        stride = -(-num_tokens // SAMPLED)
        logits_SE = decision.logits_TE[::stride].float()
        is_open_S = logits_SE.isfinite().all(-1)
        if decision.mask_T is not None:
            is_open_S = is_open_S & decision.mask_T[::stride]
        logits_SE = logits_SE.masked_fill(~is_open_S[:, None], 0.0)
        sums, peak = _sums(logits_SE, is_open_S, decision)
        self._sums = sums if self._sums is None else self._sums + sums
        self._peak = peak if self._peak is None else torch.maximum(self._peak, peak)

    def read(self) -> LogitFacts | None:
        """The facts so far; None of no tokens."""
        if self._sums is None or self._peak is None:
            return None
        tokens, logits, squares, margins, choices, in_bf16, under_noise = self._sums.tolist()
        if not tokens:
            return None
        return LogitFacts(
            num_sampled=int(tokens),
            rms=(squares / logits) ** 0.5,
            peak=float(self._peak),
            margin=margins / tokens,
            flips_bf16=in_bf16 / max(1.0, choices),
            flips_noise=under_noise / max(1.0, choices),
        )


def _sums(logits_SE: Tensor, is_open_S: Tensor, decision: RoutingDecision) -> tuple[Tensor, Tensor]:
    rechoose = decision.rechoose
    assert rechoose is not None
    num_tokens, squares = is_open_S.sum(), logits_SE.square().sum()
    rms = (squares / (num_tokens * logits_SE.shape[1]).clamp(min=1)).sqrt()
    noise_SE = _noise(*logits_SE.shape).to(logits_SE.device) * (NOISE * rms)
    # One call for all three: what choosing costs is mostly the calls.
    together = torch.cat([logits_SE, logits_SE.bfloat16().float(), logits_SE + noise_SE])
    plain, in_bf16, under_noise = _chosen(rechoose(together), together.shape[1]).chunk(3)
    plain = plain & is_open_S[:, None]
    lowest, highest = (
        logits_SE.masked_fill(~plain, torch.inf).amin(-1),
        logits_SE.masked_fill(plain, -torch.inf).amax(-1),
    )
    margin_S = lowest - highest
    sums = [
        num_tokens,
        num_tokens * logits_SE.shape[1],
        squares,
        margin_S.masked_fill(~(is_open_S & margin_S.isfinite()), 0.0).sum(),
        plain.sum(),
        (plain & ~in_bf16).sum(),
        (plain & ~under_noise).sum(),
    ]
    return torch.stack([each.double() for each in sums]), logits_SE.abs().amax()


def _chosen(expert_ids_SM: Tensor, num_choices: int) -> Tensor:
    """Whether each token chose each expert, [S, E]; the last column takes choices of -1 and is cut off."""
    ids_SM = torch.where(expert_ids_SM < 0, num_choices, expert_ids_SM)
    is_chosen = torch.zeros(len(ids_SM), num_choices + 1, dtype=torch.bool, device=ids_SM.device)
    return is_chosen.scatter_(1, ids_SM, True)[:, :num_choices]


@lru_cache(maxsize=64)
def _noise(num_tokens: int, num_experts: int) -> Tensor:
    """The same numbers every time, from a generator of their own: the run's random numbers are not touched."""
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0))
