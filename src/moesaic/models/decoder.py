"""The decoder: embedding, layers, norm, head. It knows parts, not families.

B batch, S sequence, N slots, D hidden, V vocab.
"""

from typing import Self

import torch
from torch import Tensor, nn

from moesaic.config import (
    AttentionConfig,
    LayerConfig,
    MlaConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    SoftMoeConfig,
)
from moesaic.errors import ConfigError
from moesaic.layers.attention import Attention, Sight
from moesaic.layers.documents import has_several, number_documents, row_numbers
from moesaic.layers.kv_cache import KeyValueCache, LayerState
from moesaic.layers.mla import LatentAttention
from moesaic.layers.mlp import Mlp
from moesaic.layers.moe import MoeLayer
from moesaic.layers.norm import norm
from moesaic.layers.soft_moe import SoftMoeLayer
from moesaic.models.init import initialize
from moesaic.models.mtp import PredictionLayer
from moesaic.routing import RoutingTape, Rows, TokenFacts


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); what is added may have a multiplier."""

    def __init__(self, config: LayerConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.attention_norm = norm(config.norm, hidden_size)
        self.attention = _attention(config.attention, hidden_size, layer)
        self.feed_forward_norm = norm(config.norm, hidden_size)
        self.feed_forward = _feed_forward(config.feed_forward, hidden_size, layer)

    def forward(
        self,
        x_BSD: Tensor,
        sight: Sight,
        state: LayerState | None,
        facts: TokenFacts,
        tape: RoutingTape | None,
    ) -> Tensor:
        """x_BSD for the next layer. Writes to `state` when one is handed in; `tape` hears an MoE layer's routing."""
        attended_BSD = self.attention(self.attention_norm(x_BSD), sight, state)
        x_BSD = torch.add(x_BSD, attended_BSD, alpha=self.residual_multiplier)
        fed_BSD = self._feed(self.feed_forward_norm(x_BSD), facts, tape)
        return torch.add(x_BSD, fed_BSD, alpha=self.residual_multiplier)

    def _feed(self, normed_BSD: Tensor, facts: TokenFacts, tape: RoutingTape | None) -> Tensor:
        if isinstance(self.feed_forward, MoeLayer):
            return self.feed_forward(normed_BSD, facts, tape)
        if isinstance(self.feed_forward, SoftMoeLayer):
            return self.feed_forward(normed_BSD, facts)
        return self.feed_forward(normed_BSD)


def _attention(config: AttentionConfig | MlaConfig, hidden_size: int, layer: int) -> Attention | LatentAttention:
    if isinstance(config, MlaConfig):
        return LatentAttention(config, hidden_size, layer)
    return Attention(config, hidden_size)


def _feed_forward(
    config: MlpConfig | MoeConfig | SoftMoeConfig, hidden_size: int, layer: int
) -> Mlp | MoeLayer | SoftMoeLayer:
    if isinstance(config, MoeConfig):
        return MoeLayer(config, hidden_size, layer)
    return SoftMoeLayer(config, hidden_size) if isinstance(config, SoftMoeConfig) else Mlp(config, hidden_size)


class Decoder(nn.Module):
    """A causal language model.

    Weights are left unset: load them (`moesaic.load`) or draw them (`initialize`). `device="meta"` builds shapes only.
    """

    def __init__(
        self, config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype or previous)
        try:
            with torch.device("meta"):  # no time spent on weights that will be replaced
                self._build()
        finally:
            torch.set_default_dtype(previous)
        if str(device) != "meta":
            self.to_empty(device=device or "cpu")

    def _build(self) -> None:
        config = self.config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(layer, config.hidden_size, index) for index, layer in enumerate(config.layers)
        )
        self.final_norm = norm(config.decoder.final_norm, config.hidden_size)
        self.head = None
        if not config.tie_word_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.mtp = nn.ModuleList(
            PredictionLayer(DecoderLayer(layer, config.hidden_size, index), layer.norm, config.hidden_size)
            for index, layer in enumerate(config.mtp, len(config.layers))
        )

    def initialize(self, seed: int = 0) -> Self:
        """Draw all weights anew (see models/init.py)."""
        initialize(self.config, dict(self.state_dict(keep_vars=True)), seed)
        return self

    def hidden(
        self,
        token_ids_BS: Tensor,
        mask_BS: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        tape: RoutingTape | None = None,
        document_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """x_BSD before the head: what the loss may multiply chunk by chunk. Arguments as in `forward`."""
        self._check(token_ids_BS, mask_BS, document_ids_BS, cache)
        mask_BS = mask_BS.bool() if mask_BS is not None else None
        documents_BS = None if document_ids_BS is None else number_documents(document_ids_BS)
        sight = _sight(token_ids_BS, mask_BS, cache, documents_BS)
        facts = _facts(token_ids_BS, mask_BS, documents_BS, tape)
        x_BSD = self._embedded(token_ids_BS)
        for index, layer in enumerate(self.layers):
            state = cache.states[index] if cache else None
            x_BSD = layer(x_BSD, sight, state, facts, tape)
        return self._before_head(self.final_norm(x_BSD))

    def _embedded(self, token_ids_BS: Tensor) -> Tensor:
        x_BSD, multiplier = self.embedding(token_ids_BS), self.config.embedding_multiplier
        return x_BSD if multiplier == 1 else x_BSD * multiplier

    def _before_head(self, x_BSD: Tensor) -> Tensor:
        """Divided as the logits are to be: whoever multiplies by the head need not know of it."""
        return x_BSD if self.config.logits_divisor == 1 else x_BSD / self.config.logits_divisor

    def hidden_ahead(
        self,
        hidden_BSD: Tensor,
        next_token_ids_BS: Tensor,
        mask_BS: Tensor | None = None,
        *,
        depth: int = 1,
        cache: KeyValueCache | None = None,
        tape: RoutingTape | None = None,
    ) -> Tensor:
        """h^k_BSD of `mtp` layer k = `depth`, whose `logits` predict token i + k + 1 at place i.

        hidden_BSD: h^(k-1), what `hidden` (or this, one depth less) returned for places i. next_token_ids_BS: the
        tokens i + k. mask_BS: true where both are there. cache: of this layer, made with `layers=config.mtp[k-1:k]`.
        Raises ConfigError for a depth that the model has no layer for, and for wrong shapes.
        """
        if not 1 <= depth <= len(self.mtp):
            raise ConfigError(f"depth={depth}; this model has {len(self.mtp)} layers that predict further tokens")
        if hidden_BSD.shape[:2] != next_token_ids_BS.shape:
            shapes = f"{tuple(next_token_ids_BS.shape)} for hidden states of {tuple(hidden_BSD.shape)}"
            raise ConfigError(f"next token ids of shape {shapes}; give one for each")
        self._check(next_token_ids_BS, mask_BS, None, cache)
        mask_BS = mask_BS.bool() if mask_BS is not None else None
        sight, facts = _sight(next_token_ids_BS, mask_BS, cache, None), _facts(next_token_ids_BS, mask_BS, None, tape)
        state = cache.states[0] if cache else None
        ahead_BSD = self.mtp[depth - 1](hidden_BSD, self._embedded(next_token_ids_BS), sight, state, facts, tape)
        return self._before_head(ahead_BSD)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [V, D]: the embedding's own where they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """What the head adds to the logits [V], if anything."""
        return None if self.head is None else self.head.bias

    def logits(self, x_BSD: Tensor) -> Tensor:
        """The head: logits_BSV from what `hidden` returned."""
        return torch.nn.functional.linear(x_BSD, self.head_weight, self.head_bias)

    def forward(
        self,
        token_ids_BS: Tensor,
        mask_BS: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        tape: RoutingTape | None = None,
        document_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """logits_BSV of every token.

        mask_BS: true (or 1) where there is a token, false for padding on either side. cache: the past of the batch; the
        new tokens are appended to it. tape: hears every routing decision, or dictates them. document_ids_BS: integers;
        a run of equal ids in a row is a document, whose tokens see only each other and count positions from 0. None:
        each row is one document. Raises ConfigError for wrong shapes, for document ids together with a cache, and for a
        cache where tokens see later ones (`ModelConfig.leaks_future`).
        """
        hidden_BSD = self.hidden(token_ids_BS, mask_BS, cache=cache, tape=tape, document_ids_BS=document_ids_BS)
        return self.logits(hidden_BSD)

    def _check(
        self,
        token_ids_BS: Tensor,
        mask_BS: Tensor | None,
        document_ids_BS: Tensor | None,
        cache: KeyValueCache | None,
    ) -> None:
        if token_ids_BS.dim() != 2:
            raise ConfigError(f"token ids of shape {tuple(token_ids_BS.shape)}; give [batch, sequence]")
        for what, other in (("a mask", mask_BS), ("document ids", document_ids_BS)):
            if other is not None and other.shape != token_ids_BS.shape:
                shapes = f"{tuple(other.shape)} for token ids of {tuple(token_ids_BS.shape)}"
                raise ConfigError(f"{what} of shape {shapes}; they must match")
        if document_ids_BS is not None and cache is not None:
            raise ConfigError("document ids together with a cache; give each document its own row and cache")
        if cache is not None:
            self.config.check_decodable()


def _sight(
    token_ids_BS: Tensor, mask_BS: Tensor | None, cache: KeyValueCache | None, documents_BS: Tensor | None
) -> Sight:
    if documents_BS is not None and has_several(documents_BS):
        return Sight.of_documents(documents_BS, mask_BS)
    if cache is None:
        if mask_BS is None:
            positions_BS = torch.arange(token_ids_BS.shape[1], device=token_ids_BS.device)[None]
            return Sight(positions_BS)
        return Sight((mask_BS.long().cumsum(1) - 1).clamp(min=0), valid_BN=mask_BS)
    first_slot = cache.length
    positions_BS = cache.begin(torch.ones_like(token_ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS)
    valid_BN = cache.valid_BN[:, : cache.length]
    return Sight(positions_BS, first_slot, None if bool(valid_BN.all()) else valid_BN)


def _facts(
    token_ids_BS: Tensor, mask_BS: Tensor | None, documents_BS: Tensor | None, tape: RoutingTape | None
) -> TokenFacts:
    if documents_BS is None and tape is not None:  # who does not listen does not ask
        documents_BS = row_numbers(token_ids_BS)
    mask_T = None if mask_BS is None else mask_BS.reshape(-1)
    return TokenFacts(token_ids_BS.reshape(-1), mask_T, None if documents_BS is None else documents_BS.reshape(-1))


@torch.no_grad()
def route(model: Decoder, token_ids_BS: Tensor, mask_BS: Tensor | None = None) -> dict[int, Rows]:
    """The rows of every MoE layer for these tokens, by layer index; `.as_topk()` gives expert ids and weights."""
    tape = RoutingTape()
    model.hidden(token_ids_BS, mask_BS, tape=tape)
    return {layer: decision.rows for layer, decision in tape.decisions.items()}
