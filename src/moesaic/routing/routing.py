"""What a routing decision is: rows sorted by expert.

T tokens, E experts, K choices a token, R rows (one row is one token at one expert).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moesaic.config.router import GroupConfig
from moesaic.errors import ConfigError
from moesaic.kernels import ops
from moesaic.routing.routers.router import Rechooser


class TokenOrder(NamedTuple):
    """The rows of each token, in the order of its choices: token t has rows `row_ids_R[offsets[t]:offsets[t+1]]`."""

    row_ids_R: Tensor
    token_offsets: Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Which expert serves which token, with what weight.

    token_ids_R: int64, the token of each row; rows are sorted by expert, then token, then choice.
    expert_offsets: int64 [E+1] on the CPU; expert e owns rows expert_offsets[e] to expert_offsets[e+1].
    weights_R: the router's weight of each row, fp32, with gradient.
    choice_R: int64, which of its token's choices a row is (0 is the first).
    num_tokens: T. Tokens without rows (padding) get zeros from the experts.
    top_k: K when every routed token has exactly K rows, its choices 0 to K-1; else None.
    weight_on: whether the weight multiplies the expert's output or its input (Llama 4).
    """

    token_ids_R: Tensor
    expert_offsets: Tensor
    weights_R: Tensor
    choice_R: Tensor
    num_tokens: int
    top_k: int | None
    weight_on: Literal["output", "input"] = "output"

    @property
    def num_experts(self) -> int:
        """E."""
        return self.expert_offsets.numel() - 1

    @property
    def counts_E(self) -> Tensor:
        """Rows of each expert, int64 on the CPU."""
        return self.expert_offsets.diff()

    @cached_property
    def expert_ids_R(self) -> Tensor:
        """The expert of each row, int64."""
        counts_E = self.counts_E.to(self.token_ids_R.device, non_blocking=True)
        return torch.repeat_interleave(counts_E, output_size=self.token_ids_R.numel())

    @cached_property
    def by_token(self) -> TokenOrder:
        """The same rows in token order; a token's rows are summed in this order, reproducibly."""
        token_ids_R, choice_R = self.token_ids_R, self.choice_R
        num_rows, device = token_ids_R.numel(), token_ids_R.device
        if self.top_k is not None and num_rows == self.num_tokens * self.top_k:
            offsets = torch.arange(0, num_rows + 1, self.top_k, device=device)
            return TokenOrder(_inverse(token_ids_R * self.top_k + choice_R), offsets)
        offsets = torch.zeros(self.num_tokens + 1, dtype=torch.int64, device=device)
        offsets[1:] = torch.bincount(token_ids_R, minlength=self.num_tokens).cumsum(0)
        if self.top_k is not None:
            return TokenOrder(_inverse(offsets[token_ids_R] + choice_R), offsets)
        stride = int(choice_R.max()) + 1 if num_rows else 1
        return TokenOrder(torch.argsort(token_ids_R * stride + choice_R, stable=True), offsets)

    def as_topk(self) -> tuple[Tensor, Tensor]:
        """(expert_ids_TK, weights_TK), choices in order; tokens not routed (padding) have expert -1, weight 0.

        Raises ConfigError when tokens have different numbers of rows.
        """
        if self.top_k is None:
            raise ConfigError("these rows have no fixed number of experts a token; read token_ids_R and expert_offsets")
        shape = (self.num_tokens, self.top_k)
        pair_ids_R = self.token_ids_R * self.top_k + self.choice_R
        expert_ids_R = self.expert_ids_R
        expert_ids = expert_ids_R.new_full((shape[0] * shape[1],), -1).scatter(0, pair_ids_R, expert_ids_R)
        weights = self.weights_R.new_zeros(shape[0] * shape[1]).scatter(0, pair_ids_R, self.weights_R)
        return expert_ids.view(shape), weights.view(shape)

    def choices(self) -> Tensor:
        """expert_ids_TM, -1 where a token has no M-th choice: as_topk's for any rows, M being the most of any token."""
        width = self.top_k if self.top_k is not None else int(self.choice_R.max()) + 1 if self.choice_R.numel() else 0
        expert_ids = self.choice_R.new_full((self.num_tokens * width,), -1)
        expert_ids = expert_ids.scatter(0, self.token_ids_R * width + self.choice_R, self.expert_ids_R)
        return expert_ids.view(self.num_tokens, width)

    def weighed(self, weights_TM: Tensor) -> "Rows":
        """The same rows with other weights, one for each of a token's choices (see `choices`)."""
        return replace(self, weights_R=_weights_of_rows(weights_TM, self.token_ids_R, self.choice_R))

    @classmethod
    def from_topk(
        cls,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        num_experts: int,
        *,
        mask_T: Tensor | None = None,
        weight_on: Literal["output", "input"] = "output",
        fixed_top_k: bool = True,
    ) -> "Rows":
        """Sort (token, choice) pairs by expert. Tokens where `mask_T` is false are left out, and choices of -1.

        fixed_top_k: whether every other token has all of its K choices.
        """
        if mask_T is not None:
            expert_ids_TK = torch.where(mask_T[:, None], expert_ids_TK, -1)
        token_ids_R, choice_R, expert_offsets = ops.sort_rows(expert_ids_TK, num_experts)
        return cls(
            token_ids_R=token_ids_R,
            expert_offsets=expert_offsets,
            weights_R=_weights_of_rows(weights_TK, token_ids_R, choice_R),
            choice_R=choice_R,
            num_tokens=expert_ids_TK.shape[0],
            top_k=expert_ids_TK.shape[1] if fixed_top_k else None,
            weight_on=weight_on,
        )


def _inverse(permutation_R: Tensor) -> Tensor:
    """Where each place of a permutation went: what argsort gives, in one pass."""
    places_R = torch.arange(permutation_R.numel(), device=permutation_R.device)
    return torch.empty_like(permutation_R).scatter_(0, permutation_R, places_R)


def _weights_of_rows(weights_TK: Tensor, token_ids_R: Tensor, choice_R: Tensor) -> Tensor:
    # Two index tensors would say the same, with a gradient that sorts them first.
    return weights_TK.flatten().index_select(0, token_ids_R * weights_TK.shape[1] + choice_R)


class TokenFacts(NamedTuple):
    """What routing may know of T tokens beside their hidden states.

    mask_T: true for tokens that count; None when all do. document_ids_T: the document of each token, int64, numbered
    from 0 over the whole batch; None where nobody asked: all tokens are one.
    """

    token_ids_T: Tensor | None = None
    mask_T: Tensor | None = None
    document_ids_T: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RoutingDecision:
    """One layer's routing of one batch: the rows, and what balancers and telemetry need to judge them.

    rows: what the experts compute. before_capacity: what the router chose, where a capacity has changed it; else None.
    logits_TE: the router's raw outputs, fp32. scores_TE: its score of every expert before any bias, fp32.
    ranked_TE: what was ranked where that is not the score; noise_std_TE: of the noise in it (noisy top-k).
    shared_weight_T: the weight of what overflowed to the shared expert; None where nothing can.
    slots: rows that an expert (or a device) may have in this batch; None without a limit.
    router_weight_ED: the learned router. groups: how its experts are grouped; None when they are not.
    top_k: K as it was configured, also where tokens have other numbers of rows.
    rechoose: what the router would choose of other logits_TE, as expert_ids_TM, without noise; None where that means
    nothing.
    mask_T, token_ids_T, document_ids_T: see TokenFacts.
    """

    rows: Rows
    logits_TE: Tensor
    scores_TE: Tensor
    mask_T: Tensor | None = None
    token_ids_T: Tensor | None = None
    document_ids_T: Tensor | None = None
    before_capacity: Rows | None = None
    ranked_TE: Tensor | None = None
    noise_std_TE: Tensor | None = None
    shared_weight_T: Tensor | None = None
    slots: int | None = None
    router_weight_ED: Tensor | None = None
    groups: GroupConfig | None = None
    top_k: int | None = None
    rechoose: Rechooser | None = None

    @property
    def chosen(self) -> Rows:
        """What the router chose, whether or not a capacity let it through: what balancing counts."""
        return self.rows if self.before_capacity is None else self.before_capacity


class RoutingTape:
    """Hears every routing decision of a forward pass, and can dictate them.

    Hand one to a model's forward: it records into `decisions` (layer index -> RoutingDecision). Subclasses override
    `hear` to keep less.
    replay: layer -> the rows that it takes as they are, weights included.
    choices: layer -> rows, before any capacity, whose experts it takes; the router weighs them anew, with its gradient.
    """

    def __init__(self, replay: dict[int, Rows] | None = None, *, choices: dict[int, Rows] | None = None) -> None:
        self.decisions: dict[int, RoutingDecision] = {}
        self.replay = replay or {}
        self.choices = choices or {}

    def hear(self, layer: int, decision: RoutingDecision) -> None:
        """Called by each MoE layer once a forward pass."""
        self.decisions[layer] = decision
