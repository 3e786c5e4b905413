"""What a routing decision is: rows sorted by expert.

T tokens, E experts, K choices a token, R rows (one row is one token at one expert).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.kernels import ops


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
    top_k: K when every routed token has exactly K rows, else None.
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
        return self.expert_offsets.numel() - 1

    @property
    def counts_E(self) -> Tensor:
        """Rows of each expert, int64 on the CPU."""
        return self.expert_offsets.diff()

    @property
    def expert_ids_R(self) -> Tensor:
        """The expert of each row, int64."""
        return torch.repeat_interleave(self.counts_E).to(self.token_ids_R.device)

    @cached_property
    def by_token(self) -> TokenOrder:
        """The same rows in token order; a token's rows are summed in this order, reproducibly."""
        stride = int(self.choice_R.max()) + 1 if self.choice_R.numel() else 1
        row_ids_R = torch.argsort(self.token_ids_R * stride + self.choice_R, stable=True)
        offsets = torch.zeros(self.num_tokens + 1, dtype=torch.int64, device=row_ids_R.device)
        offsets[1:] = torch.bincount(self.token_ids_R, minlength=self.num_tokens).cumsum(0)
        return TokenOrder(row_ids_R, offsets)

    def as_topk(self) -> tuple[Tensor, Tensor]:
        """(expert_ids_TK, weights_TK), choices in order; tokens not routed (padding) have expert -1, weight 0.

        Raises ConfigError when tokens have different numbers of rows.
        """
        if self.top_k is None:
            raise ConfigError("these rows have no fixed number of experts a token; read token_ids_R and expert_offsets")
        shape = (self.num_tokens, self.top_k)
        expert_ids_TK = torch.full(shape, -1, dtype=torch.int64, device=self.token_ids_R.device)
        expert_ids_TK[self.token_ids_R, self.choice_R] = self.expert_ids_R
        weights_TK = torch.zeros(shape, dtype=self.weights_R.dtype, device=self.weights_R.device)
        weights_TK = weights_TK.index_put((self.token_ids_R, self.choice_R), self.weights_R)
        return expert_ids_TK, weights_TK

    @classmethod
    def from_topk(
        cls,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        num_experts: int,
        *,
        mask_T: Tensor | None = None,
        weight_on: Literal["output", "input"] = "output",
    ) -> "Rows":
        """Sort (token, choice) pairs by expert. Tokens where `mask_T` is false are left out."""
        if mask_T is not None:
            expert_ids_TK = torch.where(mask_T[:, None], expert_ids_TK, -1)
        token_ids_R, choice_R, expert_offsets = ops.sort_rows(expert_ids_TK, num_experts)
        return cls(
            token_ids_R=token_ids_R,
            expert_offsets=expert_offsets,
            weights_R=weights_TK[token_ids_R, choice_R],
            choice_R=choice_R,
            num_tokens=expert_ids_TK.shape[0],
            top_k=expert_ids_TK.shape[1],
            weight_on=weight_on,
        )


@dataclass(frozen=True, eq=False)
class RoutingDecision:
    """One layer's routing of one batch: the rows, and what balancers and telemetry need to judge them.

    logits_TE: the router's raw outputs, fp32. scores_TE: its score of every expert before any bias, fp32.
    mask_T: true for tokens that count; None when all do.
    """

    rows: Rows
    logits_TE: Tensor
    scores_TE: Tensor
    mask_T: Tensor | None = None


class RoutingTape:
    """Hears every routing decision of a forward pass, and can dictate them.

    Hand one to a model's forward: it records into `decisions` (layer index -> RoutingDecision). A tape built with
    `replay` makes each layer take those rows instead of choosing. Subclasses override `hear` to keep less.
    """

    def __init__(self, replay: dict[int, Rows] | None = None) -> None:
        self.decisions: dict[int, RoutingDecision] = {}
        self.replay = replay or {}

    def hear(self, layer: int, decision: RoutingDecision) -> None:
        """Called by each MoE layer once a forward pass."""
        self.decisions[layer] = decision
