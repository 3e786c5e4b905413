"""What one forward tells, of layers alike together: telemetry's time is mostly the number of its calls.

L layers, T tokens, E experts, M domains, R routed rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.routing import RoutingDecision, Rows
from moesaic.telemetry.logits import Sample, sample

MOST_STACKED_BYTES = 4 << 20  # of scores that are copied to look at them together; a larger layer is looked at alone


class Heard(NamedTuple):
    """Sums over a forward's tokens, on the device where they were found: making them waits for none.

    layers: L of them. counts_LE: rows of each expert, on the CPU. num_tokens: of each layer. entropy_L, scores_LE: see
    `score_sums`. dropped_rows: by layer, by a capacity; lost_tokens: those that lost every row so.
    """

    layers: tuple[int, ...]
    counts_LE: Tensor
    num_tokens: Tensor | int
    entropy_L: Tensor
    scores_LE: Tensor
    domain_counts_MLE: Tensor | None
    dropped_rows: dict[int, int]
    lost_tokens: dict[int, Tensor]
    sample: Sample | None


def alike(decisions: dict[int, RoutingDecision]) -> Iterator[dict[int, RoutingDecision]]:
    """The layers in groups that `listen` takes: of as many tokens and experts, and of routers of one configuration."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for layer, decision in decisions.items():
        rechoose, scores_TE = decision.rechoose, decision.scores_TE
        router = rechoose and (rechoose.settings, rechoose.selection_bias_E is None)
        key = (scores_TE.shape, scores_TE.dtype, decision.logits_TE.shape, id(decision.mask_T), router)
        groups.setdefault(key, []).append(layer)
    for layers in groups.values():
        scores_TE = decisions[layers[0]].scores_TE
        most = max(1, MOST_STACKED_BYTES // max(1, scores_TE.numel() * scores_TE.element_size()))
        for start in range(0, len(layers), most):
            yield {layer: decisions[layer] for layer in layers[start : start + most]}


@torch.no_grad()
def listen(decisions: dict[int, RoutingDecision], domains_T: Tensor | int | None, num_domains: int) -> Heard:
    """What layers alike have decided. domains_T: the domain of each token, or of all of them."""
    found = list(decisions.values())
    mask_T = found[0].mask_T
    counts_LE = torch.stack([decision.chosen.expert_offsets for decision in found]).diff()
    entropy_L, scores_LE = score_sums(stacked([decision.scores_TE for decision in found]), mask_T)
    limited = {layer: decision for layer, decision in decisions.items() if decision.before_capacity is not None}
    return Heard(
        layers=tuple(decisions),
        counts_LE=counts_LE,
        num_tokens=found[0].chosen.num_tokens if mask_T is None else mask_T.sum(),
        entropy_L=entropy_L,
        scores_LE=scores_LE,
        domain_counts_MLE=_domain_counts([one.chosen for one in found], counts_LE, domains_T, num_domains),
        dropped_rows={
            layer: one.chosen.token_ids_R.numel() - one.rows.token_ids_R.numel() for layer, one in limited.items()
        },
        lost_tokens={layer: (_has_rows(one.chosen) & ~_has_rows(one.rows)).sum() for layer, one in limited.items()},
        sample=sample(found),
    )


def score_sums(scores_LTE: Tensor, mask_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(The sum over tokens of the entropy of their scores in nats [L], that of their scores as shares [L, E]); fp64.

    Scores are divided by their sum first, so sigmoid scores are judged as shares too:
    H = ln S - sum(s ln s) / S, with S = sum(s). Tokens where `mask_T` is false do not count.
    """
    tiny = torch.finfo(scores_LTE.dtype).tiny
    total_LT = scores_LTE.sum(-1).clamp_min_(tiny)
    # torch.special.entr says the same and takes twice as long on a CPU: its logarithm is not vectorised.
    negated_LT = scores_LTE.clamp_min(tiny).log_().mul_(scores_LTE).sum(-1)
    parts_LT = total_LT.reciprocal()
    entropy_LT = total_LT.log_().sub_(negated_LT.mul_(parts_LT))
    if mask_T is not None:
        entropy_LT, parts_LT = entropy_LT.masked_fill(~mask_T, 0.0), parts_LT.masked_fill(~mask_T, 0.0)
    return entropy_LT.sum(-1, dtype=torch.float64), (parts_LT[:, None] @ scores_LTE)[:, 0].double()


def stacked(parts: list[Tensor]) -> Tensor:
    """Tensors of one shape as one, without a copy where there is only one."""
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def _domain_counts(
    rows: list[Rows], counts_LE: Tensor, domains_T: Tensor | int | None, num_domains: int
) -> Tensor | None:
    if domains_T is None:
        return None
    size = (num_domains, *counts_LE.shape)
    if isinstance(domains_T, int):
        found_MLE = counts_LE.new_zeros(size)
        found_MLE[domains_T] = counts_LE
        return found_MLE
    token_ids_R = torch.cat([one.token_ids_R for one in rows])
    num_rows, device = token_ids_R.numel(), token_ids_R.device
    # Rows stand in the order of their experts.
    experts_R = torch.repeat_interleave(counts_LE.flatten().to(device, non_blocking=True), output_size=num_rows)
    cells_R = (
        domains_T.flatten().to(device, torch.int64).index_select(0, token_ids_R).mul_(counts_LE.numel()).add_(experts_R)
    )
    found = torch.zeros(num_domains * counts_LE.numel(), dtype=torch.int64, device=device)
    found.index_add_(0, cells_R, torch.ones_like(cells_R))  # bincount would wait for the device
    return found.view(size)


def _has_rows(rows: Rows) -> Tensor:
    """Whether each token is served at all, [T]."""
    return torch.zeros(rows.num_tokens, dtype=torch.bool, device=rows.token_ids_R.device).index_fill(
        0, rows.token_ids_R, True
    )
