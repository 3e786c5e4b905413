"""Multi-Token Prediction: layers after the last that predict the tokens after the next (arXiv:2412.19437, sec. 2.2).

B batch, S sequence, D hidden.
"""

import torch
from torch import Tensor, nn

from moesaic.config import LayerConfig
from moesaic.layers.attention import Sight
from moesaic.layers.compressed_state import CompressedState
from moesaic.layers.hyper_connection import StreamJoin
from moesaic.layers.kv_cache import LayerState
from moesaic.layers.norm import norm
from moesaic.routing import RoutingTape, TokenFacts


class PredictionLayer(nn.Module):
    """h^k = norm(layer(M [norm(Emb(t_(i+k))); norm(h^(k-1)_i)])), eq. 21-22; embedding and head are the model's own.

    The released matrix M has the embedding's half first, where eq. 21 writes it second. `hidden_norm` is over what the
    model's head reads, so after the model's final norm, and `final_norm` before the shared head is one of its own.
    With residual streams (DeepSeek-V4) h^(k-1) are those after the last layer, each of which is normed and projected
    for itself; h^k are streams, too, which `joined` makes the vector of that the head reads.
    """

    def __init__(self, layer: nn.Module, config: LayerConfig, hidden_size: int) -> None:
        super().__init__()
        norms, streams = config.norm, config.hyper_connection
        self.embedding_norm = norm(norms, hidden_size)
        self.hidden_norm = norm(norms, hidden_size)
        self.projection = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.layer = layer
        self.final_norm = norm(norms, hidden_size)
        self.stream_join = StreamJoin(streams, hidden_size) if streams else None

    def forward(
        self,
        hidden_BSD: Tensor,
        embedding_BSD: Tensor,
        sight: Sight,
        state: LayerState | CompressedState | None,
        facts: TokenFacts,
        tape: RoutingTape | None,
    ) -> Tensor:
        """h^k_BSD from h^(k-1) and the embeddings of tokens k places on. Writes to `state` when one is handed in."""
        embedding_BSD = self.embedding_norm(embedding_BSD)
        if self.stream_join is not None:
            embedding_BSD = self.stream_join.split(embedding_BSD)
        both_BS2D = torch.cat([embedding_BSD, self.hidden_norm(hidden_BSD)], dim=-1)
        x_BSD = self.layer(self.projection(both_BS2D), sight, state, facts, tape)
        return self.final_norm(x_BSD) if self.stream_join is None else x_BSD

    def joined(self, streams_BSND: Tensor) -> Tensor:
        """x_BSD for the shared head, from residual streams."""
        assert self.stream_join is not None, "a layer without streams returns what the head reads"
        return self.final_norm(self.stream_join(streams_BSND))
