"""The Mixture-of-Experts layer: router → rows → experts (+ shared) → sum. The heart, one screen.

B batch, S sequence, T = B*S tokens, D hidden, E experts.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from moesaic.config import MoeConfig, RouterConfig
from moesaic.experts.grouped import GroupedExperts
from moesaic.layers.mlp import Mlp
from moesaic.routing import RoutingDecision, RoutingTape, Rows, TokenFacts
from moesaic.routing.routers import ROUTERS, RouterInput


class RouterLayer(nn.Module):
    """The learned part of a router: `weight` [E, D], and a fp32 `selection_bias` [E] that no gradient reaches."""

    selection_bias: Tensor | None

    def __init__(self, config: RouterConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.choose = ROUTERS[config.name]
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.selection_bias else None
        self.register_buffer("selection_bias", bias)

    def forward(self, x_TD: Tensor, facts: TokenFacts, choices: Rows | None = None) -> RoutingDecision:
        """Choose experts for every token, in fp32 (or wider) whatever the model's dtype.

        choices: rows whose experts are taken instead; they are weighed anew.
        """
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        logits_TE = torch.nn.functional.linear(x_TD.to(wide), self.weight.to(wide))
        dictated_TK = choices.as_topk()[0] if choices is not None else None
        choice = self.choose(RouterInput(logits_TE, facts.token_ids_T, self.selection_bias, dictated_TK), self.config)
        if choices is not None:
            rows = choices.weighed(choice.weights_TK)
        else:
            rows = Rows.from_topk(
                choice.expert_ids_TK,
                choice.weights_TK,
                self.config.num_experts,
                mask_T=facts.mask_T,
                weight_on=choice.weight_on,
            )
        return RoutingDecision(rows, logits_TE, choice.scores_TE, facts.mask_T, facts.document_ids_T)


class MoeLayer(nn.Module):
    """Sends every token to a few experts and sums their weighted outputs (arXiv:1701.06538, eq. 1)."""

    def __init__(self, config: MoeConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.router = RouterLayer(config.router, hidden_size)
        self.experts = GroupedExperts(config, hidden_size)
        self.shared_experts = Mlp(config.shared, hidden_size) if config.shared else None

    def forward(self, x_BSD: Tensor, facts: TokenFacts | None = None, tape: RoutingTape | None = None) -> Tensor:
        """y_BSD. Tokens that `facts` masks reach no routed expert. `tape` hears the decision or dictates it."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        choices = tape.choices.get(self.layer) if tape is not None else None
        decision = self.router(x_TD, facts or TokenFacts(), choices)
        if tape is not None:
            if self.layer in tape.replay:
                decision = replace(decision, rows=tape.replay[self.layer])
            tape.hear(self.layer, decision)
        y_TD = self.experts.compute(x_TD, decision.rows)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.view_as(x_BSD)
