"""What a router's logits tell: how large they are, and how little would change its choices.

S sampled tokens, T tokens, E experts, M columns of choices.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moesaic.routing import RoutingDecision
from moesaic.telemetry.load import LogitFacts

SAMPLED = 64  # tokens of each forward: choosing again costs too much for all of them
NOISE = 0.01  # standard deviation, of the logits' root mean square
MOST_HELD = 32  # forwards whose samples are held before they are added up


class _Sample(NamedTuple):
    """Tokens of one forward. is_open_S: which of them count. expert_ids_3SM: what is chosen of their logits as they
    are, rounded to bf16, and under noise."""

    logits_SE: Tensor
    is_open_S: Tensor
    expert_ids_3SM: Tensor


class LogitSums:
    """Adds up what forwards tell, of `SAMPLED` tokens each, evenly spaced. Draws nothing from torch's generators.

    A forward is only sampled while a step runs; numpy, whose calls on so few numbers cost a fifth of torch's and do
    not wait for a device each, adds up afterwards.
    """

    def __init__(self) -> None:
        self._samples: list[_Sample] = []
        self._sums = np.zeros(7)  # tokens, logits, squares, margins, choices, flips in bf16 and under noise
        self._peak = 0.0

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
        self._samples.append(_Sample(logits_SE, is_open_S, _choices(logits_SE, is_open_S, decision.rechoose)))
        if len(self._samples) == MOST_HELD:
            self._add_up()

    def read(self) -> LogitFacts | None:
        """The facts so far; None of no tokens."""
        self._add_up()
        tokens, logits, squares, margins, choices, in_bf16, under_noise = self._sums.tolist()
        if not tokens:
            return None
        return LogitFacts(
            num_sampled=int(tokens),
            rms=(squares / logits) ** 0.5,
            peak=self._peak,
            margin=margins / tokens,
            flips_bf16=in_bf16 / max(1.0, choices),
            flips_noise=under_noise / max(1.0, choices),
        )

    def _add_up(self) -> None:
        for sample in self._samples:
            self._sums += _sums(sample)
            self._peak = max(self._peak, float(sample.logits_SE.abs().amax()))
        self._samples.clear()


def _choices(logits_SE: Tensor, is_open_S: Tensor, rechoose: Callable[[Tensor], Tensor]) -> Tensor:
    num_logits = (is_open_S.sum() * logits_SE.shape[1]).clamp(min=1)
    rms = torch.linalg.vector_norm(logits_SE) / num_logits.sqrt()
    noise_SE = _noise(*logits_SE.shape).to(logits_SE.device) * (NOISE * rms)
    # One call for all three: what choosing costs is mostly the calls.
    return rechoose(torch.cat([logits_SE, logits_SE.bfloat16().float(), logits_SE + noise_SE]))


def _sums(sample: _Sample) -> list[float]:
    logits_SE, is_open_S = sample.logits_SE.cpu().numpy(), sample.is_open_S.cpu().numpy()
    num_tokens, num_experts = int(is_open_S.sum()), logits_SE.shape[1]
    plain, in_bf16, under_noise = np.split(_chosen(sample.expert_ids_3SM.cpu().numpy(), num_experts), 3)
    plain = plain & is_open_S[:, None]
    lowest_S = np.where(plain, logits_SE, np.inf).min(-1)
    highest_S = np.where(plain, -np.inf, logits_SE).max(-1)
    # Without a choice, or without another expert, there is no margin.
    margin_S = (lowest_S - highest_S)[is_open_S & np.isfinite(lowest_S) & np.isfinite(highest_S)]
    return [
        num_tokens,
        num_tokens * num_experts,
        float(np.square(logits_SE, dtype=np.float64).sum()),
        float(margin_S.sum(dtype=np.float64)),
        int(plain.sum()),
        int((plain & ~in_bf16).sum()),
        int((plain & ~under_noise).sum()),
    ]


def _chosen(expert_ids_NM: np.ndarray, num_experts: int) -> np.ndarray:
    """Whether each token chose each expert, [N, E]; the last column takes choices of -1 and is cut off."""
    is_chosen = np.zeros((len(expert_ids_NM), num_experts + 1), dtype=bool)
    is_chosen[np.arange(len(expert_ids_NM))[:, None], expert_ids_NM] = True
    return is_chosen[:, :num_experts]


@lru_cache(maxsize=64)
def _noise(num_tokens: int, num_experts: int) -> Tensor:
    """The same numbers every time, from a generator of their own: the run's random numbers are not touched."""
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0))
