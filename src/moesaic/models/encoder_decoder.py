"""The encoder-decoder: a source is read as a whole, a target is written token by token. It knows parts, not families.

B batch, M source tokens, S target tokens, D hidden, V vocab.
"""

from torch import Tensor, nn

from moesaic.checks import require
from moesaic.errors import ConfigError, GenerationError
from moesaic.layers.kv_cache import KeyValueCache, Memory
from moesaic.layers.norm import norm
from moesaic.models.base import LanguageModel, sight_of
from moesaic.models.decoder import DecoderLayer
from moesaic.routing import RoutingTape


class EncoderDecoder(LanguageModel):
    """A model that writes a target for a source (Vaswani et al., arXiv:1706.03762); see LanguageModel.

    `layers` holds the encoder's layers, then the decoder's: their places are their numbers on routing tapes.
    """

    def _build(self) -> None:
        config, size = self.config, self.config.hidden_size
        require(config.encoder is not None, "a model without an encoder; build it with moesaic.models.build")
        self.num_encoder_layers = first = len(config.layers) - len(config.decoder.layers)
        self.embedding = nn.Embedding(config.vocab_size, size)
        self.layers = nn.ModuleList(
            DecoderLayer(layer, size, index, index if index < first else index - first)
            for index, layer in enumerate(config.layers)
        )
        assert config.encoder is not None
        self.encoder_final_norm = norm(config.encoder.final_norm, size)
        self.final_norm = norm(config.decoder.final_norm, size)
        self._build_head()
        self.mtp = nn.ModuleList()

    def encode(
        self, source_ids_BM: Tensor, source_mask_BM: Tensor | None = None, *, tape: RoutingTape | None = None
    ) -> Tensor:
        """memory_BMD: what cross attention looks at. Arguments as in `forward`."""
        _check("source", source_ids_BM, source_mask_BM)
        source_mask_BM = None if source_mask_BM is None else source_mask_BM.bool()
        sight = sight_of(source_ids_BM, source_mask_BM, None, None)
        sight.causal = False
        facts = self._facts(source_ids_BM, source_mask_BM, None, tape)
        x_BMD = self._embedded(source_ids_BM, sight.positions_BS)
        for layer in self.layers[: self.num_encoder_layers]:
            x_BMD = layer(x_BMD, sight, None, facts, tape)
        return self.encoder_final_norm(x_BMD)

    def read(
        self,
        source_ids_BM: Tensor,
        source_mask_BM: Tensor | None = None,
        *,
        cache: KeyValueCache,
        tape: RoutingTape | None = None,
    ) -> None:
        """Encode sources for all the target tokens to come: `hidden` finds them in the cache."""
        _memory(self.encode(source_ids_BM, source_mask_BM, tape=tape), source_mask_BM, cache)

    def hidden(
        self,
        target_ids_BS: Tensor,
        mask_BS: Tensor | None = None,
        *,
        source_ids_BM: Tensor | None = None,
        source_mask_BM: Tensor | None = None,
        memory_BMD: Tensor | None = None,
        cache: KeyValueCache | None = None,
        tape: RoutingTape | None = None,
    ) -> Tensor:
        """x_BSD before the head: what the loss may multiply chunk by chunk.

        Of source_ids_BM and memory_BMD, what `encode` returned, one is given; a cache that has seen it needs neither.
        Other arguments as in `forward`. Raises GenerationError for a cache of another memory.
        """
        _check("target", target_ids_BS, mask_BS)
        if cache is not None:
            self.config.check_decodable()
        if source_ids_BM is not None and memory_BMD is None:
            memory_BMD = self.encode(source_ids_BM, source_mask_BM, tape=tape)
        elif source_ids_BM is not None:
            raise ConfigError("source ids and a memory; give one of them")
        memory = _memory(memory_BMD, source_mask_BM, cache)
        if len(memory.states_BMD) != len(target_ids_BS):
            raise ConfigError(f"{len(memory.states_BMD)} sources for {len(target_ids_BS)} targets; give one for each")
        mask_BS = None if mask_BS is None else mask_BS.bool()
        sight = sight_of(target_ids_BS, mask_BS, cache, None)
        sight.memory = memory
        facts = self._facts(target_ids_BS, mask_BS, None, tape)
        x_BSD = self._embedded(target_ids_BS, sight.positions_BS)
        for index, layer in enumerate(self.layers[self.num_encoder_layers :]):
            x_BSD = layer(x_BSD, sight, cache.states[index] if cache else None, facts, tape)
        return self._divided(self.final_norm(x_BSD))

    def forward(
        self,
        source_ids_BM: Tensor,
        target_ids_BS: Tensor,
        source_mask_BM: Tensor | None = None,
        mask_BS: Tensor | None = None,
        *,
        tape: RoutingTape | None = None,
    ) -> Tensor:
        """logits_BSV of every target token, of which the first is the model's decoder_start_token_id.

        source_mask_BM, mask_BS: true (or 1) where there is a token, false for padding on either side. tape: hears every
        routing decision, or dictates it. Raises ConfigError for wrong shapes.
        """
        return self.logits(
            self.hidden(target_ids_BS, mask_BS, source_ids_BM=source_ids_BM, source_mask_BM=source_mask_BM, tape=tape)
        )


def _memory(memory_BMD: Tensor | None, mask_BM: Tensor | None, cache: KeyValueCache | None) -> Memory:
    """What the targets look at; a cache keeps it, with the keys and values made of it."""
    known = None if cache is None else cache.memory
    if known is not None and (memory_BMD is None or memory_BMD is known.states_BMD):
        return known
    if known is not None:
        raise GenerationError("a cache that has seen another source; make a new one for each batch of sources")
    if memory_BMD is None:
        raise ConfigError("a target without a source; give source ids, or the memory that encode() makes of them")
    if mask_BM is not None and mask_BM.shape != memory_BMD.shape[:2]:
        raise ConfigError(
            f"a source mask of shape {tuple(mask_BM.shape)} for a memory of {tuple(memory_BMD.shape)}; they must match"
        )
    memory = Memory(memory_BMD, None if mask_BM is None else mask_BM.bool(), None if cache is None else {})
    if cache is not None:
        cache.memory = memory
    return memory


def _check(what: str, ids: Tensor, mask: Tensor | None) -> None:
    if ids.dim() != 2:
        raise ConfigError(f"{what} ids of shape {tuple(ids.shape)}; give [batch, sequence]")
    if mask is not None and mask.shape != ids.shape:
        raise ConfigError(f"a mask of shape {tuple(mask.shape)} for {what} ids of {tuple(ids.shape)}; they must match")
