"""Slots and dropping: which rows get to their experts, and where the others go. Dropless is a capacity without end.

T tokens, E experts, R rows, N claims (the rows in the order in which they claim slots), L claims without a slot yet,
A those of them that ask in this round, G groups of tokens, B budgets (for each group one an expert, or one a device).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.config.capacity import CapacityConfig
from moesaic.config.router import RouterConfig
from moesaic.kernels import ops
from moesaic.routing.routers.router import keep_best_groups
from moesaic.routing.routing import RoutingDecision, Rows


def limit(
    decision: RoutingDecision, capacity: CapacityConfig, router: RouterConfig, selection_bias_E: Tensor | None = None
) -> RoutingDecision:
    """The decision with no more rows than there are slots; what the router chose stands in `before_capacity`.

    Rows that stay keep their weights, with gradient. The same choices, scores and weights give the same rows: there is
    no chance in it, and ties go to the earlier choice, then the earlier token. `selection_bias_E` helps to rank the
    next-best expert, as it did to choose. (See CapacityConfig for the rules and their sources.)
    """
    if torch.compiler.is_compiling():  # imported here: it loads half of the compiler
        from moesaic.routing import uncompiled

        return uncompiled.limit(decision, capacity, router, selection_bias_E)
    chosen = decision.rows
    budgets = _Budgets.of(decision, capacity, router)
    order_N = _ORDERS[capacity.drop](chosen, decision.scores_TE.detach())
    token_ids_N, expert_ids_N = chosen.token_ids_R[order_N], chosen.expert_ids_R[order_N]
    has_slot_N = _find_room(budgets.of_pairs(token_ids_N, expert_ids_N), budgets.slots_B)
    expert_ids_N = expert_ids_N.masked_fill(~has_slot_N, -1)
    if capacity.overflow == "next_best":
        expert_ids_N = _move(token_ids_N, expert_ids_N, budgets, _ranked(decision, router, selection_bias_E))
    expert_ids_R = torch.empty_like(expert_ids_N).scatter_(0, order_N, expert_ids_N)
    weights_R = chosen.weights_R
    if capacity.overflow == "next_best":
        weights_R = _reweighed(chosen, expert_ids_R, decision.scores_TE)
    if capacity.renormalize:
        weights_R = _divided_anew(chosen, expert_ids_R, weights_R)
    return replace(
        decision,
        rows=_rearranged(chosen, expert_ids_R, weights_R),
        before_capacity=chosen,
        slots=budgets.slots_of_expert,
        shared_weight_T=_lost_weight(chosen, expert_ids_R) if capacity.overflow == "shared" else None,
    )


class _Budgets(NamedTuple):
    """Who shares slots with whom: the tokens of a group, at one expert or at the experts of one device.

    group_T: the group of each token that counts. slots_of_expert: the sum over groups, of one expert (or device).
    """

    group_T: Tensor
    slots_B: Tensor
    num_a_group: int
    experts_a_budget: int
    slots_of_expert: int

    @classmethod
    def of(cls, decision: RoutingDecision, capacity: CapacityConfig, router: RouterConfig) -> "_Budgets":
        """The budgets of one batch: its tokens that count, in their documents, or cut into groups in their order."""
        num_tokens, mask_T, device = decision.rows.num_tokens, decision.mask_T, decision.scores_TE.device
        if mask_T is None:
            number_T, counted = torch.arange(num_tokens, device=device), num_tokens
        else:
            number_T, counted = (mask_T.cumsum(0) - 1).clamp(min=0), int(mask_T.sum())
        if capacity.group_size == "document":
            assert decision.document_ids_T is not None, "a capacity by document, and nobody said which these are"
            group_T = decision.document_ids_T
            sizes = torch.bincount(group_T if mask_T is None else group_T[mask_T]).tolist()
        else:
            size = capacity.group_size or max(1, counted)
            group_T = number_T // size
            sizes = [min(size, counted - first) for first in range(0, counted, size)]
        slots = [capacity.slots(size, router) for size in sizes]
        num_a_group = capacity.num_budgets(router)
        return cls(
            group_T=group_T,
            slots_B=torch.tensor(slots, dtype=torch.int64, device=device).repeat_interleave(num_a_group),
            num_a_group=num_a_group,
            experts_a_budget=router.num_experts // num_a_group,
            slots_of_expert=sum(slots),
        )

    def of_pairs(self, token_ids: Tensor, expert_ids: Tensor) -> Tensor:
        """The budget of each token at each expert; the two broadcast."""
        return self.group_T[token_ids] * self.num_a_group + expert_ids // self.experts_a_budget


def _by_position(chosen: Rows, scores_TE: Tensor) -> Tensor:
    """Rows by choice, then token (GShard, arXiv:2006.16668, alg. 1)."""
    return torch.argsort(chosen.choice_R * chosen.num_tokens + chosen.token_ids_R)


def _by_probability(chosen: Rows, scores_TE: Tensor) -> Tensor:
    """Rows by weight, the largest first, then choice, then token (DeepSeek-V2, arXiv:2405.04434, sec. 2.2.4)."""
    order_N = _by_position(chosen, scores_TE)
    return order_N[torch.argsort(chosen.weights_R.detach()[order_N], descending=True, stable=True)]


def _batch_prioritized(chosen: Rows, scores_TE: Tensor) -> Tensor:
    """Rows by choice, then by the best score among their token's choices, then token (V-MoE, arXiv:2106.05974, 4.1)."""
    scores_R = scores_TE[chosen.token_ids_R, chosen.expert_ids_R]
    best_T = scores_TE.new_full((chosen.num_tokens,), -torch.inf)
    best_T = best_T.scatter_reduce(0, chosen.token_ids_R, scores_R, "amax")
    turn_T = torch.argsort(torch.argsort(best_T, descending=True, stable=True))
    return torch.argsort(chosen.choice_R * chosen.num_tokens + turn_T[chosen.token_ids_R])


_ORDERS: dict[str, Callable[[Rows, Tensor], Tensor]] = {
    "position": _by_position,
    "probability": _by_probability,
    "batch_prioritized": _batch_prioritized,
}


def _find_room(budget_ids_N: Tensor, room_B: Tensor) -> Tensor:
    """Whether each claim, made in this order, finds a slot in its budget."""
    order_N = torch.argsort(budget_ids_N, stable=True)
    sorted_ids_N = budget_ids_N[order_N]
    counts_B = torch.bincount(budget_ids_N, minlength=room_B.numel())
    first_B = counts_B.cumsum(0) - counts_B
    place_N = torch.arange(budget_ids_N.numel(), device=budget_ids_N.device) - first_B[sorted_ids_N]
    return torch.empty_like(place_N, dtype=torch.bool).scatter_(0, order_N, place_N < room_B[sorted_ids_N])


def _ranked(decision: RoutingDecision, router: RouterConfig, selection_bias_E: Tensor | None) -> Tensor:
    """ranked_TE as the router saw it, -inf where it may not choose; a tensor of its own."""
    ranked_TE = (decision.scores_TE if decision.ranked_TE is None else decision.ranked_TE).detach()
    if selection_bias_E is not None:
        ranked_TE = ranked_TE + selection_bias_E
    if router.groups is not None:
        # What is -inf itself counts as merely low inside a group; a row never moves there.
        ranked_TE = keep_best_groups(ranked_TE, router.groups).masked_fill(ranked_TE == -torch.inf, -torch.inf)
    return ranked_TE[:, : router.num_experts].clone()


def _move(token_ids_N: Tensor, expert_ids_N: Tensor, budgets: _Budgets, ranked_TE: Tensor) -> Tensor:
    """expert_ids_N where claims without an expert (-1) have moved to the next best that has room, if any.

    In rounds: each token's first claim without a slot names the best expert that the token does not have yet and that
    has room; these claims are met in their order; who lost names another one in the next round. Uses up `ranked_TE`.
    """
    experts_E = torch.arange(ranked_TE.shape[1], device=ranked_TE.device)
    expert_ids_N = expert_ids_N.clone()
    has_slot_N = expert_ids_N >= 0
    taken_N = budgets.of_pairs(token_ids_N[has_slot_N], expert_ids_N[has_slot_N])
    room_B = budgets.slots_B - torch.bincount(taken_N, minlength=budgets.slots_B.numel())
    ranked_TE[token_ids_N[has_slot_N], expert_ids_N[has_slot_N]] = -torch.inf
    waiting_L = (~has_slot_N).nonzero().flatten()
    is_done_T = torch.zeros(ranked_TE.shape[0], dtype=torch.bool, device=ranked_TE.device)
    while waiting_L.numel():
        asking_A = waiting_L[_is_first(token_ids_N[waiting_L], is_done_T.numel())]
        tokens_A = token_ids_N[asking_A]
        is_full_AE = room_B[budgets.of_pairs(tokens_A[:, None], experts_E)] <= 0
        best_A, can_A = _best(ranked_TE[tokens_A].masked_fill(is_full_AE, -torch.inf))
        is_done_T[tokens_A[~can_A]] = True  # room only shrinks: who finds none now never will
        asking_A, best_A = asking_A[can_A], best_A[can_A]
        budget_ids_A = budgets.of_pairs(token_ids_N[asking_A], best_A)
        wins_A = _find_room(budget_ids_A, room_B)
        winners, experts = asking_A[wins_A], best_A[wins_A]
        expert_ids_N[winners] = experts
        ranked_TE[token_ids_N[winners], experts] = -torch.inf
        room_B -= torch.bincount(budget_ids_A[wins_A], minlength=room_B.numel())
        waiting_L = waiting_L[(expert_ids_N[waiting_L] < 0) & ~is_done_T[token_ids_N[waiting_L]]]
    return expert_ids_N


def _best(ranked_AE: Tensor) -> tuple[Tensor, Tensor]:
    """The best expert of each claim, the lower id among equals, and whether there is any above -inf."""
    best_A1 = ops.select_topk(ranked_AE, 1)
    return best_A1.squeeze(1), ranked_AE.gather(1, best_A1).squeeze(1) > -torch.inf


def _is_first(token_ids_L: Tensor, num_tokens: int) -> Tensor:
    """Whether no earlier claim is of the same token."""
    places_L = torch.arange(token_ids_L.numel(), device=token_ids_L.device)
    first_T = places_L.new_full((num_tokens,), token_ids_L.numel())
    return first_T.scatter_reduce(0, token_ids_L, places_L, "amin")[token_ids_L] == places_L


def _reweighed(chosen: Rows, expert_ids_R: Tensor, scores_TE: Tensor) -> Tensor:
    """weights_R; a row that moved weighs the new expert's score over the old one's as much: the same sum divides it."""
    old_R = scores_TE[chosen.token_ids_R, chosen.expert_ids_R]
    new_R = scores_TE[chosen.token_ids_R, expert_ids_R.clamp(min=0)]
    is_moved_R = (expert_ids_R >= 0) & (expert_ids_R != chosen.expert_ids_R)
    # A score of 0 was the weight's numerator: the row weighs 0 wherever it goes. Never divide by it, also not in
    # a branch that is thrown away: its gradient would not be.
    is_nothing_R = old_R <= 0
    share_R = (chosen.weights_R / old_R.masked_fill(is_nothing_R, 1.0)).masked_fill(is_nothing_R, 0.0)
    return torch.where(is_moved_R, share_R * new_R, chosen.weights_R)


def _divided_anew(chosen: Rows, expert_ids_R: Tensor, weights_R: Tensor) -> Tensor:
    """weights_R over the sum of what each token has left."""
    left_R = weights_R.masked_fill(expert_ids_R < 0, 0.0)
    sums_T = left_R.new_zeros(chosen.num_tokens).index_add(0, chosen.token_ids_R, left_R)
    sums_R = sums_T.index_select(0, chosen.token_ids_R)
    return weights_R / sums_R.masked_fill(sums_R < torch.finfo(sums_R.dtype).tiny, 1.0)


def _rearranged(chosen: Rows, expert_ids_R: Tensor, weights_R: Tensor) -> Rows:
    """Rows at new experts, sorted anew; those at -1 are gone."""
    kept = (expert_ids_R >= 0).nonzero().flatten()
    token_ids, choice, expert_ids = chosen.token_ids_R[kept], chosen.choice_R[kept], expert_ids_R[kept]
    width = int(chosen.choice_R.max()) + 1 if chosen.choice_R.numel() else 1
    order = torch.argsort((expert_ids * chosen.num_tokens + token_ids) * width + choice)
    offsets = torch.zeros(chosen.num_experts + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(expert_ids, minlength=chosen.num_experts).cumsum(0)
    return replace(
        chosen,
        token_ids_R=token_ids[order],
        expert_offsets=offsets,
        weights_R=weights_R.index_select(0, kept[order]),
        choice_R=choice[order],
        top_k=None,
    )


def _lost_weight(chosen: Rows, expert_ids_R: Tensor) -> Tensor:
    """The sum of the weights of each token's rows that are gone, [T], added up in the order of its choices."""
    width = int(chosen.choice_R.max()) + 1 if chosen.choice_R.numel() else 1
    lost_R = chosen.weights_R.masked_fill(expert_ids_R >= 0, 0.0)
    pair_ids_R = chosen.token_ids_R * width + chosen.choice_R
    lost_TM = lost_R.new_zeros(chosen.num_tokens * width).scatter(0, pair_ids_R, lost_R)
    return lost_TM.view(chosen.num_tokens, width).sum(-1)
