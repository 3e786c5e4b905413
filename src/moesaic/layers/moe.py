"""The Mixture-of-Experts layer: router → rows → experts (+ shared) → sum. The heart, one screen.

B batch, S sequence, T = B*S tokens, D hidden, E experts.
"""

import torch
from torch import Tensor, nn

from moesaic.config import MoeConfig, RouterConfig
from moesaic.experts.grouped import GroupedExperts
from moesaic.layers.mlp import Mlp
from moesaic.routing import RoutingDecision, RoutingTape, Rows
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

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None, mask_T: Tensor | None) -> RoutingDecision:
        """Choose experts for every token, in fp32 whatever the model's dtype."""
        logits_TE = torch.nn.functional.linear(x_TD.float(), self.weight.float())
        choice = self.choose(RouterInput(logits_TE, token_ids_T, self.selection_bias), self.config)
        rows = Rows.from_topk(
            choice.expert_ids_TK,
            choice.weights_TK,
            self.config.num_experts,
            mask_T=mask_T,
            weight_on=choice.weight_on,
        )
        return RoutingDecision(rows, logits_TE, choice.scores_TE, mask_T)


class MoeLayer(nn.Module):
    """Sends every token to a few experts and sums their weighted outputs (arXiv:1701.06538, eq. 1)."""

    def __init__(self, config: MoeConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.router = RouterLayer(config.router, hidden_size)
        self.experts = GroupedExperts(config, hidden_size)
        self.shared_experts = Mlp(config.shared, hidden_size) if config.shared else None

    def forward(
        self,
        x_BSD: Tensor,
        token_ids_BS: Tensor | None = None,
        mask_BS: Tensor | None = None,
        tape: RoutingTape | None = None,
    ) -> Tensor:
        """y_BSD. Tokens where `mask_BS` is false reach no routed expert. `tape` hears the decision or dictates it."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        token_ids_T = None if token_ids_BS is None else token_ids_BS.reshape(-1)
        decision = self.router(x_TD, token_ids_T, None if mask_BS is None else mask_BS.reshape(-1))
        if tape is not None:
            if self.layer in tape.replay:
                decision = self._dictated(decision, tape.replay[self.layer])
            tape.hear(self.layer, decision)
        y_TD = self.experts.compute(x_TD, decision.rows)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.view_as(x_BSD)

    @staticmethod
    def _dictated(decision: RoutingDecision, rows: Rows) -> RoutingDecision:
        return RoutingDecision(rows, decision.logits_TE, decision.scores_TE, decision.mask_T)
