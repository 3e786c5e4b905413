"""The decoder: embedding, layers, norm, head. It knows parts, not families.

B batch, S sequence, N slots, D hidden, V vocab.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moesaic.checks import require
from moesaic.config import (
    AbsentConfig,
    AttentionConfig,
    CompressedAttentionConfig,
    LayerConfig,
    MlaConfig,
    MlpConfig,
    MoeConfig,
    RecurrentConfig,
    SoftMoeConfig,
)
from moesaic.errors import ConfigError
from moesaic.layers.attention import Attention, Sight
from moesaic.layers.compressed_attention import CompressedAttention
from moesaic.layers.compressed_state import CompressedState
from moesaic.layers.cross_attention import CrossAttention
from moesaic.layers.documents import number_documents
from moesaic.layers.hyper_connection import HyperConnection, StreamJoin
from moesaic.layers.kv_cache import KeyValueCache, LayerState
from moesaic.layers.mla import LatentAttention
from moesaic.layers.mlp import Mlp
from moesaic.layers.moe import MoeLayer
from moesaic.layers.norm import norm
from moesaic.layers.soft_moe import SoftMoeLayer
from moesaic.models.base import LanguageModel, sight_of
from moesaic.models.mtp import PredictionLayer
from moesaic.routing import RoutingTape, Rows, TokenFacts


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); what is added may have a multiplier.

    In a decoder with an encoder, between the two, x + cross_attention(norm(x)).
    layer: its number in the model; place: in its stack, where that is another.
    Where the layer has hyper-connections, these stand in for the adding, and x is residual streams BSND.
    """

    def __init__(self, config: LayerConfig, hidden_size: int, layer: int, place: int | None = None) -> None:
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.attention_norm = norm(config.norm, hidden_size)
        self.attention = _attention(config.attention, hidden_size, layer if place is None else place)
        self.cross_attention_norm, self.cross_attention = None, None
        if config.cross_attention is not None:
            self.cross_attention_norm = norm(config.norm, hidden_size)
            self.cross_attention = CrossAttention(config.cross_attention, hidden_size, layer)
        self.feed_forward_norm = norm(config.norm, hidden_size)
        self.feed_forward = _feed_forward(config.feed_forward, hidden_size, layer)
        self.attention_connection = _connection(config, hidden_size)
        self.feed_forward_connection = _connection(config, hidden_size)

    def forward(
        self,
        x_BSD: Tensor,
        sight: Sight,
        state: LayerState | CompressedState | None,
        facts: TokenFacts,
        tape: RoutingTape | None,
    ) -> Tensor:
        """x_BSD for the next layer. Writes to `state` when one is handed in; `tape` hears an MoE layer's routing."""

        def attend(x_BSD: Tensor) -> Tensor:
            return self.attention(self.attention_norm(x_BSD), sight, state)

        def feed(x_BSD: Tensor) -> Tensor:
            return self._feed(self.feed_forward_norm(x_BSD), facts, tape)

        x_BSD = self._add(x_BSD, attend, self.attention_connection)
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            looked_BSD = self.cross_attention(self.cross_attention_norm(x_BSD), sight)
            x_BSD = torch.add(x_BSD, looked_BSD, alpha=self.residual_multiplier)
        return self._add(x_BSD, feed, self.feed_forward_connection)

    def _add(self, x_BSD: Tensor, part: Callable[[Tensor], Tensor], connection: HyperConnection | None) -> Tensor:
        if connection is not None:
            return connection(x_BSD, part)
        return torch.add(x_BSD, part(x_BSD), alpha=self.residual_multiplier)

    def _feed(self, normed_BSD: Tensor, facts: TokenFacts, tape: RoutingTape | None) -> Tensor:
        if isinstance(self.feed_forward, MoeLayer):
            return self.feed_forward(normed_BSD, facts, tape)
        if isinstance(self.feed_forward, SoftMoeLayer):
            return self.feed_forward(normed_BSD, facts)
        return self.feed_forward(normed_BSD)


def _connection(config: LayerConfig, hidden_size: int) -> HyperConnection | None:
    return HyperConnection(config.hyper_connection, hidden_size) if config.hyper_connection else None


def _attention(
    config: AttentionConfig | MlaConfig | CompressedAttentionConfig | RecurrentConfig | AbsentConfig,
    hidden_size: int,
    layer: int,
) -> Attention | LatentAttention | CompressedAttention:
    assert not isinstance(config, RecurrentConfig | AbsentConfig), "LanguageModel refuses what is only described"
    if isinstance(config, MlaConfig):
        return LatentAttention(config, hidden_size, layer)
    if isinstance(config, CompressedAttentionConfig):
        return CompressedAttention(config, hidden_size)
    return Attention(config, hidden_size, layer)


def _feed_forward(
    config: MlpConfig | MoeConfig | SoftMoeConfig | AbsentConfig, hidden_size: int, layer: int
) -> Mlp | MoeLayer | SoftMoeLayer:
    assert not isinstance(config, AbsentConfig), "LanguageModel refuses what is only described"
    if isinstance(config, MoeConfig):
        return MoeLayer(config, hidden_size, layer)
    return SoftMoeLayer(config, hidden_size) if isinstance(config, SoftMoeConfig) else Mlp(config, hidden_size)


class Decoder(LanguageModel):
    """A causal language model (see LanguageModel)."""

    def _build(self) -> None:
        config = self.config
        require(config.encoder is None, "a model with an encoder; build it with moesaic.models.build")
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(layer, config.hidden_size, index) for index, layer in enumerate(config.layers)
        )
        streams = config.decoder.hyper_connection
        self.stream_join = StreamJoin(streams, config.hidden_size) if streams else None
        self.final_norm = norm(config.decoder.final_norm, config.hidden_size)
        self._build_head()
        self.mtp = nn.ModuleList(
            PredictionLayer(DecoderLayer(layer, config.hidden_size, index), layer, config.hidden_size)
            for index, layer in enumerate(config.mtp, len(config.layers))
        )

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
        carried = self.carried(token_ids_BS, mask_BS, cache=cache, tape=tape, document_ids_BS=document_ids_BS)
        return self.before_head(carried)

    def carried(
        self,
        token_ids_BS: Tensor,
        mask_BS: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        tape: RoutingTape | None = None,
        document_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """What `hidden_ahead` goes on from, and `before_head` makes `hidden` of: that itself, x_BSD, but residual
        streams BSND where there are such. Arguments as in `forward`."""
        self._check(token_ids_BS, mask_BS, document_ids_BS, cache)
        mask_BS = mask_BS.bool() if mask_BS is not None else None
        documents_BS = None if document_ids_BS is None else number_documents(document_ids_BS)
        sight = sight_of(token_ids_BS, mask_BS, cache, documents_BS)
        facts = self._facts(token_ids_BS, mask_BS, documents_BS, tape)
        x_BSD = self._embedded(token_ids_BS, sight.positions_BS)
        if self.stream_join is not None:
            x_BSD = self.stream_join.split(x_BSD)
        for index, layer in enumerate(self.layers):
            state = cache.states[index] if cache else None
            x_BSD = layer(x_BSD, sight, state, facts, tape)
        return x_BSD if self.stream_join is not None else self._divided(self.final_norm(x_BSD))

    def before_head(self, carried: Tensor, *, depth: int = 0) -> Tensor:
        """x_BSD of which `logits` are made, from what `carried` (depth 0) or `hidden_ahead` returned."""
        if self.stream_join is None:
            return carried
        if depth:
            layer = self.mtp[depth - 1]
            assert isinstance(layer, PredictionLayer)
            return self._divided(layer.joined(carried))
        return self._divided(self.final_norm(self.stream_join(carried)))

    def hidden_ahead(
        self,
        hidden_BSD: Tensor,
        next_token_ids_BS: Tensor,
        mask_BS: Tensor | None = None,
        *,
        depth: int = 1,
        cache: KeyValueCache | None = None,
        tape: RoutingTape | None = None,
        document_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """h^k_BSD of `mtp` layer k = `depth`, whose `logits` predict token i + k + 1 at place i.

        hidden_BSD: h^(k-1), what `hidden` (or this, one depth less) returned for places i. Where there are residual
        streams, both are those of `carried`, and `before_head` stands before the logits. next_token_ids_BS: the
        tokens i + k. mask_BS: true where both are there. cache: of this layer, made with `layers=config.mtp[k-1:k]`.
        document_ids_BS: of places i, as in `forward`; mask out those whose token i + k is of another document.
        Raises ConfigError for a depth that the model has no layer for, and for wrong shapes.
        """
        if not 1 <= depth <= len(self.mtp):
            raise ConfigError(f"depth={depth}; this model has {len(self.mtp)} layers that predict further tokens")
        if hidden_BSD.shape[:2] != next_token_ids_BS.shape:
            shapes = f"{tuple(next_token_ids_BS.shape)} for hidden states of {tuple(hidden_BSD.shape)}"
            raise ConfigError(f"next token ids of shape {shapes}; give one for each")
        self._check(next_token_ids_BS, mask_BS, document_ids_BS, cache)
        mask_BS = mask_BS.bool() if mask_BS is not None else None
        documents_BS = None if document_ids_BS is None else number_documents(document_ids_BS)
        sight = sight_of(next_token_ids_BS, mask_BS, cache, documents_BS)
        facts = self._facts(next_token_ids_BS, mask_BS, documents_BS, tape)
        state = cache.states[0] if cache else None
        embedded_BSD = self._embedded(next_token_ids_BS, sight.positions_BS)
        ahead_BSD = self.mtp[depth - 1](hidden_BSD, embedded_BSD, sight, state, facts, tape)
        return ahead_BSD if self.stream_join is not None else self._divided(ahead_BSD)

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


@torch.no_grad()
def route(model: Decoder, token_ids_BS: Tensor, mask_BS: Tensor | None = None) -> dict[int, Rows]:
    """The rows of every MoE layer for these tokens, by layer index; `.as_topk()` gives expert ids and weights."""
    tape = RoutingTape()
    model.hidden(token_ids_BS, mask_BS, tape=tape)
    return {layer: decision.rows for layer, decision in tape.decisions.items()}
