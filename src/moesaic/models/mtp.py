"""Multi-Token Prediction: layers after the last that predict the tokens after the next (arXiv:2412.19437, sec. 2.2).

B batch, S sequence, D hidden.
"""

import torch
from torch import Tensor, nn

from moesaic.config import NormConfig
from moesaic.layers.attention import Sight
from moesaic.layers.kv_cache import LayerState
from moesaic.layers.norm import norm
from moesaic.routing import RoutingTape, TokenFacts


class PredictionLayer(nn.Module):
    """h^k = norm(layer(M [norm(Emb(t_(i+k))); norm(h^(k-1)_i)])), eq. 21-22; embedding and head are the model's own.

    The released matrix M has the embedding's half first, where eq. 21 writes it second. `hidden_norm` is over what the
    model's head reads, so after the model's final norm, and `final_norm` before the shared head is one of its own.
    """

    def __init__(self, layer: nn.Module, norms: NormConfig, hidden_size: int) -> None:
        super().__init__()
        self.embedding_norm = norm(norms, hidden_size)
        self.hidden_norm = norm(norms, hidden_size)
        self.projection = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.layer = layer
        self.final_norm = norm(norms, hidden_size)

    def forward(
        self,
        hidden_BSD: Tensor,
        embedding_BSD: Tensor,
        sight: Sight,
        state: LayerState | None,
        facts: TokenFacts,
        tape: RoutingTape | None,
    ) -> Tensor:
        """h^k_BSD from h^(k-1) and the embeddings of tokens k places on. Writes to `state` when one is handed in."""
        both_BS2D = torch.cat([self.embedding_norm(embedding_BSD), self.hidden_norm(hidden_BSD)], dim=-1)
        return self.final_norm(self.layer(self.projection(both_BS2D), sight, state, facts, tape))
