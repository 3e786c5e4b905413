"""The Mixture-of-Experts layer: router → rows → experts (+ shared) → sum. The heart, one screen.

B batch, S sequence, T = B*S tokens, D hidden, E experts.
"""

from dataclasses import replace

from torch import Tensor, nn

from moesaic.config import MoeConfig
from moesaic.experts.grouped import GroupedExperts
from moesaic.layers.mlp import Mlp
from moesaic.layers.router import RouterLayer
from moesaic.routing import RoutingTape, TokenFacts


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
