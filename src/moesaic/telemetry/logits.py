"""What routers' logits tell: how large they are, and how little would change the choices.

L layers, S sampled tokens, E experts, M columns of choices.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moesaic.routing import RoutingDecision
from moesaic.routing.routers import Rechooser
from moesaic.telemetry.load import LogitFacts

SAMPLED = 64  # tokens of each forward: choosing again costs too much for all of them
NOISE = 0.01  # standard deviation, of the logits' root mean square


class Sample(NamedTuple):
    """Tokens of one forward. is_open_LS: which of them count. expert_ids_L3SM: what is chosen of their logits as they
    are, rounded to bf16, and under noise."""

    logits_LSE: Tensor
    is_open_LS: Tensor
    expert_ids_L3SM: Tensor


def sample(decisions: Sequence[RoutingDecision]) -> Sample | None:
    """`SAMPLED` tokens of a forward, evenly spaced, in layers whose routers and numbers of tokens are alike.

    None of routers without logits, or whose tokens compete: they tell nothing. Draws nothing from torch's generators.
    """
    rechoosers = [decision.rechoose for decision in decisions if decision.rechoose is not None]
    num_tokens, mask_T = decisions[0].logits_TE.shape[0], decisions[0].mask_T
    if len(rechoosers) < len(decisions) or not num_tokens:
        return None
    stride = -(-num_tokens // SAMPLED)
    logits_LSE = torch.stack([decision.logits_TE[::stride] for decision in decisions]).float()
    is_open_LS = logits_LSE.isfinite().all(-1)
    if mask_T is not None:
        is_open_LS = is_open_LS & mask_T[::stride]
    logits_LSE = logits_LSE.masked_fill(~is_open_LS[:, :, None], 0.0)
    return Sample(logits_LSE, is_open_LS, _choices(logits_LSE, is_open_LS, rechoosers))


def _choices(logits_LSE: Tensor, is_open_LS: Tensor, rechoosers: Sequence[Rechooser]) -> Tensor:
    num_layers, num_sampled, num_experts = logits_LSE.shape
    num_logits_L = (is_open_LS.sum(-1) * num_experts).clamp(min=1)
    rms_L = torch.linalg.vector_norm(logits_LSE, dim=(1, 2)) / num_logits_L.sqrt()
    noise_SE = _noise(num_sampled, num_experts).to(logits_LSE.device)
    noisy_LSE = logits_LSE + noise_SE * (NOISE * rms_L)[:, None, None]
    variants_L3SE = torch.stack([logits_LSE, logits_LSE.bfloat16().float(), noisy_LSE], dim=1)
    # One call for all: what choosing costs is mostly the calls.
    expert_ids_NM = Rechooser.joined(rechoosers, 3 * num_sampled)(variants_L3SE.view(-1, num_experts))
    return expert_ids_NM.view(num_layers, 3, num_sampled, -1)


class LogitSums(NamedTuple):
    """What samples add up to, float64 [L, 7] (tokens, logits, squares, margins, choices, flips in bf16, under noise),
    and their largest magnitudes [L]."""

    sums_L7: np.ndarray
    peak_L: np.ndarray

    @classmethod
    def of(cls, found: Sample) -> "LogitSums":
        """A sample's; in numpy, whose calls on so few numbers cost a fifth of torch's and do not wait for a device."""
        logits_LSE, is_open_LS = found.logits_LSE.cpu().numpy(), found.is_open_LS.cpu().numpy()
        num_experts, tokens_L = logits_LSE.shape[-1], is_open_LS.sum(-1)
        is_chosen_L3SE = _chosen(found.expert_ids_L3SM.cpu().numpy(), num_experts) & is_open_LS[:, None, :, None]
        plain_LSE = is_chosen_L3SE[:, 0]
        lowest_LS = np.where(plain_LSE, logits_LSE, np.inf).min(-1)
        highest_LS = np.where(plain_LSE, -np.inf, logits_LSE).max(-1)
        # Without a choice, or without another expert, there is no margin.
        has_margin_LS = is_open_LS & np.isfinite(lowest_LS) & np.isfinite(highest_LS)
        margin_LS = np.subtract(lowest_LS, highest_LS, where=has_margin_LS, out=np.zeros_like(lowest_LS))
        flat_LN = logits_LSE.reshape(len(logits_LSE), -1)
        columns = (
            tokens_L,
            tokens_L * num_experts,
            np.square(flat_LN, dtype=np.float64).sum(-1),
            margin_LS.sum(-1, dtype=np.float64),
            plain_LSE.sum((1, 2)),
            *(plain_LSE[:, None] & ~is_chosen_L3SE[:, 1:]).sum((2, 3)).T,
        )
        return cls(np.stack(columns, axis=1, dtype=np.float64), np.abs(flat_LN).max(-1))


def facts_of(sums_7: np.ndarray, peak: float) -> LogitFacts | None:
    """One layer's facts; None of no tokens."""
    tokens, logits, squares, margins, choices, in_bf16, under_noise = sums_7.tolist()
    if not tokens:
        return None
    return LogitFacts(
        num_sampled=int(tokens),
        rms=(squares / logits) ** 0.5,
        peak=peak,
        margin=margins / tokens,
        flips_bf16=in_bf16 / max(1.0, choices),
        flips_noise=under_noise / max(1.0, choices),
    )


def _chosen(expert_ids_L3SM: np.ndarray, num_experts: int) -> np.ndarray:
    """Whether each token chose each expert, [L, 3, S, E]; the last column takes choices of -1 and is cut off."""
    ids_NM = expert_ids_L3SM.reshape(-1, expert_ids_L3SM.shape[-1])
    is_chosen = np.zeros((len(ids_NM), num_experts + 1), dtype=bool)
    is_chosen[np.arange(len(ids_NM))[:, None], ids_NM] = True
    return is_chosen[:, :num_experts].reshape(*expert_ids_L3SM.shape[:-1], num_experts)


@lru_cache(maxsize=64)
def _noise(num_tokens: int, num_experts: int) -> Tensor:
    """The same numbers every time, from a generator of their own: the run's random numbers are not touched."""
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0))
