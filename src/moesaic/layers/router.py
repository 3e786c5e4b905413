"""The learned part of a router, and the way from hidden states to a routing decision.

T tokens, D hidden, E experts, K choices a token.
"""

import torch
from torch import Tensor, nn

from moesaic.router_config import RouterConfig
from moesaic.routing import RoutingDecision, Rows, TokenFacts
from moesaic.routing.routers import ROUTERS, Choice, RouterInput


class RouterLayer(nn.Module):
    """The learned part of a router: `weight` [E, D], and a fp32 `selection_bias` [E] that no gradient reaches."""

    selection_bias: Tensor | None

    def __init__(self, config: RouterConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.choose = ROUTERS[config.name]
        self.weight = nn.Parameter(torch.empty(config.num_choices, hidden_size))
        bias = torch.zeros(config.num_choices, dtype=torch.float32) if config.selection_bias else None
        self.register_buffer("selection_bias", bias)

    def forward(self, x_TD: Tensor, facts: TokenFacts, choices: Rows | None = None) -> RoutingDecision:
        """Choose experts for every token, in fp32 (or wider) whatever the model's dtype.

        choices: rows whose experts are taken instead; they are weighed anew.
        """
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        logits_TE = torch.nn.functional.linear(x_TD.to(wide), self.weight.to(wide))
        choice = self.choose(
            RouterInput(
                logits_TE,
                token_ids_T=facts.token_ids_T,
                selection_bias_E=self.selection_bias,
                dictated_TM=choices.choices() if choices is not None else None,
                mask_T=facts.mask_T,
                training=self.training,
            ),
            self.config,
        )
        return RoutingDecision(
            rows=self._rows(choice, facts, choices),
            logits_TE=logits_TE,
            scores_TE=choice.scores_TE,
            mask_T=facts.mask_T,
            document_ids_T=facts.document_ids_T,
            ranked_TE=choice.ranked_TE,
            noise_std_TE=choice.noise_std_TE,
            router_weight_ED=self.weight,
            groups=self.config.groups,
        )

    def _rows(self, choice: Choice, facts: TokenFacts, choices: Rows | None) -> Rows:
        if choices is not None:
            return choices.weighed(choice.weights_TM)
        return Rows.from_topk(
            choice.expert_ids_TM,
            choice.weights_TM,
            self.config.num_experts,
            mask_T=facts.mask_T,
            weight_on=choice.weight_on,
            fixed_top_k=self.config.kind.fixed_top_k,
        )
