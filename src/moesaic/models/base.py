"""What a decoder and an encoder-decoder have in common: how they are built, their embedding and their head.

B batch, S sequence, N slots, D hidden, V vocab.
"""

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig, MoeConfig, OutlinedModel
from moesaic.errors import ConfigError
from moesaic.layers.attention import Sight
from moesaic.layers.documents import has_several, row_numbers
from moesaic.layers.kv_cache import KeyValueCache
from moesaic.layers.positions import sinusoids
from moesaic.models.init import initialize
from moesaic.routing import RoutingTape, TokenFacts


class LanguageModel(nn.Module):
    """Token ids in, logits out.

    Weights are left unset: load them (`moesaic.load`) or draw them (`initialize`). `device="meta"` builds shapes only.
    Raises ConfigError for a model that is only described.
    """

    embedding: nn.Embedding
    head: nn.Linear | None

    def __init__(
        self, config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if isinstance(config, OutlinedModel):
            raise ConfigError(f"this {config.family} model is described for counts and plans; no modules here run it")
        self.config = config
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype or previous)
        try:
            with torch.device("meta"):  # no time spent on weights that will be replaced
                self._build()
        finally:
            torch.set_default_dtype(previous)
        self._asks_for_documents = any(
            capacity is not None and capacity.group_size == "document"
            for layer in config.layers
            if isinstance(layer.feed_forward, MoeConfig)
            for capacity in (layer.feed_forward.capacity, layer.feed_forward.evaluation_capacity)
        )
        if str(device) != "meta":
            self.to_empty(device=device or "cpu")

    @abstractmethod
    def _build(self) -> None:
        """Make all modules, in the order of `config.tensors()`."""

    def _build_head(self) -> None:
        config = self.config
        self.head = None
        if not config.tie_word_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)

    def initialize(self, seed: int = 0) -> Self:
        """Draw all weights anew (see models/init.py)."""
        initialize(self.config, dict(self.state_dict(keep_vars=True)), seed)
        return self

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [V, D]: the embedding's own where they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """What the head adds to the logits [V], if anything."""
        return None if self.head is None else self.head.bias

    @abstractmethod
    def hidden(self, *args: Any, **kwargs: Any) -> Tensor:
        """x_BSD before the head: what the loss may multiply chunk by chunk."""

    def carried(self, *args: Any, **kwargs: Any) -> Tensor:
        """What `before_head` makes `hidden` of, from the same arguments: that itself, unless there are streams."""
        return self.hidden(*args, **kwargs)

    def before_head(self, carried: Tensor, *, depth: int = 0) -> Tensor:
        """x_BSD of which `logits` are made, from what `carried` returned (depth 0), or `depth` layers further on."""
        return carried

    def logits(self, x_BSD: Tensor) -> Tensor:
        """The head: logits_BSV from what `hidden` returned."""
        return torch.nn.functional.linear(x_BSD, self.embedding.weight) if self.head is None else self.head(x_BSD)

    def _embedded(self, token_ids_BS: Tensor, positions_BS: Tensor) -> Tensor:
        x_BSD, multiplier = self.embedding(token_ids_BS), self.config.embedding_multiplier
        x_BSD = x_BSD if multiplier == 1 else x_BSD * multiplier
        if self.config.sinusoid is None:
            return x_BSD
        return x_BSD + sinusoids(self.config.sinusoid, positions_BS, x_BSD.shape[-1]).to(x_BSD.dtype)

    def _divided(self, x_BSD: Tensor) -> Tensor:
        """Divided as the logits are to be: whoever multiplies by the head need not know of it."""
        return x_BSD if self.config.logits_divisor == 1 else x_BSD / self.config.logits_divisor

    def _facts(
        self, token_ids_BS: Tensor, mask_BS: Tensor | None, documents_BS: Tensor | None, tape: RoutingTape | None
    ) -> TokenFacts:
        if documents_BS is None and (tape is not None or self._asks_for_documents):  # else nobody would look
            documents_BS = row_numbers(token_ids_BS)
        mask_T = None if mask_BS is None else mask_BS.reshape(-1)
        return TokenFacts(token_ids_BS.reshape(-1), mask_T, None if documents_BS is None else documents_BS.reshape(-1))


def sight_of(
    token_ids_BS: Tensor, mask_BS: Tensor | None, cache: KeyValueCache | None, documents_BS: Tensor | None
) -> Sight:
    """What new tokens, of which `mask_BS` (bool) are none, may see of each other and of what the cache keeps."""
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
