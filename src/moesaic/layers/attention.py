"""Grouped-query attention, full or over a window, within documents where a row holds several.

B batch, S new tokens, N visible slots, H heads, G key/value heads, A head dim, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from moesaic.config import AttentionConfig, LongRopeConfig, RelativeBiasConfig, RopeConfig, TemperatureConfig
from moesaic.kernels.attention import attention
from moesaic.layers.documents import Segments, positions, segments
from moesaic.layers.kv_cache import LayerState, Memory, Past
from moesaic.layers.norm import norm, unit_rms
from moesaic.layers.positions import RelativeBias
from moesaic.layers.rope import Rotation, rotate, rotation

# Rows of documents up to this long are attended to with a mask, longer ones document by document. A mask makes the
# kernel compute all of S * S: forward and backward of a layer took 1.0x the plain causal time at 256 tokens, 1.2x
# (bf16 1.4x) at 1024 and 1.5x (1.8x) at 2048; cut into 8 documents, 1.0x (1.8x), 0.7x (1.0x) and 0.7x (0.9x).
MASKED_LENGTH = 512


@dataclass(eq=False)
class Sight:
    """Where a batch of new tokens stands and what it may see; layers of a kind share its rotations and masks.

    positions_BS: token positions, padding not counted. first_slot: the slot of the first new token.
    valid_BN: which slots hold tokens, None when all do.
    documents_BN: numbers by which tokens know those of their own document, None when each row is one (a mask would
    cost it the causal path's speed). segments: the documents cut out of their rows, where that is faster than a mask.
    choices: what indexers left to the queries, by layer, for later layers that take the same.
    causal: whether tokens see earlier ones only. memory: of the sources, for cross attention.
    biases: relative ones, by the layer that has their table and the slots they are for.
    """

    positions_BS: Tensor
    first_slot: int = 0
    valid_BN: Tensor | None = None
    documents_BN: Tensor | None = None
    segments: Segments | None = None
    choices: dict[int, Tensor | None] = field(default_factory=dict)
    causal: bool = True
    memory: Memory | None = None
    biases: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    _rotations: dict[tuple[RopeConfig, int, torch.dtype], Rotation] = field(default_factory=dict)
    _masks: dict[tuple[int | None, int | None, int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of_documents(cls, documents_BS: Tensor, mask_BS: Tensor | None) -> "Sight":
        """Of whole rows that hold several documents: numbered by `number_documents`."""
        cut = mask_BS is None and documents_BS.shape[1] > MASKED_LENGTH
        return cls(
            positions(documents_BS, mask_BS),
            valid_BN=mask_BS,
            documents_BN=documents_BS,
            segments=segments(documents_BS) if cut else None,
        )

    @cached_property
    def within(self) -> "list[Sight]":
        """The sight of each bundle of segments."""
        shapes = self.segments.shapes if self.segments is not None else []
        return [Sight(torch.arange(length, device=self.positions_BS.device)[None]) for _, length in shapes]

    def rotation(self, rope: RopeConfig, head_dim: int, dtype: torch.dtype) -> Rotation:
        """The rotation of these positions, computed once for all layers that share it."""
        key = (rope, head_dim, dtype)
        if key not in self._rotations:
            lengths_BS = self.lengths_BS if isinstance(rope.scaling, LongRopeConfig) else None
            self._rotations[key] = rotation(rope, head_dim, self.positions_BS, dtype, lengths_BS)
        return self._rotations[key]

    @cached_property
    def lengths_BS(self) -> Tensor | None:
        """How long the text of each token is so far, where rows hold several documents; None where rows tell it."""
        if self.documents_BN is None:
            return None
        ends_T = (self.positions_BS + 1).flatten()
        if self.valid_BN is not None:
            ends_T = ends_T * self.valid_BN.flatten()
        documents_T = self.documents_BN.flatten()
        lengths = torch.zeros_like(documents_T).scatter_reduce(0, documents_T, ends_T, "amax")
        return lengths[self.documents_BN]

    def needs_mask(self, window: int | None, num_slots: int, chunk: int | None = None) -> bool:
        """Whether plain causality (or, for one new token, no mask at all) does not say it all."""
        new = self.positions_BS.shape[1]
        if not self.causal:
            return self.valid_BN is not None or self.documents_BN is not None
        in_window = window is None or num_slots <= window
        in_chunk = chunk is None or self.first_slot + new <= chunk
        whole = self.valid_BN is None and self.documents_BN is None
        return not (whole and in_window and in_chunk and new in (1, num_slots))

    def mask(self, window: int | None, first_slot: int, num_slots: int, chunk: int | None = None) -> Tensor:
        """What each new token sees, bool [B or 1, 1, S, N].

        A padding token sees itself: a row without any visible slot would turn into NaN and spread.
        """
        key = (window, chunk, first_slot, num_slots)
        if key not in self._masks:
            device = self.positions_BS.device
            query_S1 = torch.arange(self.positions_BS.shape[1], device=device)[:, None] + self.first_slot
            slot_N = torch.arange(num_slots, device=device) + first_slot
            visible = slot_N <= query_S1 if self.causal else torch.ones_like(slot_N <= query_S1)
            if window is not None:
                visible = visible & (slot_N > query_S1 - window)
            visible = visible[None, None]
            if chunk is not None:
                chunk_BN = self._places(first_slot, num_slots) // chunk
                chunk_BS = chunk_BN[:, self.first_slot - first_slot :]
                visible = visible & (chunk_BS[:, None, :, None] == chunk_BN[:, None, None, :])
            if self.documents_BN is not None:  # new tokens only: there is no past
                visible = visible & (self.documents_BN[:, None, :, None] == self.documents_BN[:, None, None, :])
            if self.valid_BN is not None:
                valid_BN = self.valid_BN[:, first_slot : first_slot + num_slots]
                visible = visible & (valid_BN[:, None, None, :] | (slot_N == query_S1))
            self._masks[key] = visible
        return self._masks[key]

    def _places(self, first_slot: int, num_slots: int) -> Tensor:
        """How far each slot is from the first token of its row, or of its document, [B or 1, N]."""
        if self.documents_BN is not None:
            return self.positions_BS
        places_BN = torch.arange(num_slots, device=self.positions_BS.device)[None] + first_slot
        return places_BN if self.valid_BN is None else places_BN - (self.valid_BN.cumsum(1) == 0).sum(1, keepdim=True)

    def temperature(self, config: TemperatureConfig) -> Tensor:
        """What the queries of these positions are multiplied by, [B or 1, S, 1, 1], in fp32."""
        steps_BS = ((self.positions_BS + 1) // config.interval).float()
        return (1 + config.scale * steps_BS.log1p())[:, :, None, None]


class Attention(nn.Module):
    """Softmax attention of H query heads over G shared key/value heads (arXiv:2305.13245).

    layer: its number in the stack, by which others find its relative biases.
    """

    def __init__(self, config: AttentionConfig, hidden_size: int, layer: int = 0) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        query_size = config.num_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.sinks = nn.Parameter(torch.empty(config.num_heads)) if config.sinks else None
        self.relative_bias: RelativeBias | None = None
        if isinstance(config.relative_bias, RelativeBiasConfig):
            self.relative_bias = RelativeBias(config.relative_bias, config.num_heads)
        self.q_proj = nn.Linear(hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, key_value_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, key_value_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, hidden_size, bias=config.output_bias)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.head_norm is not None:
            self.q_norm, self.k_norm = (norm(config.head_norm, config.head_dim) for _ in "qk")
        if config.projection_norm is not None:
            sizes = (query_size, key_value_size)
            self.q_norm, self.k_norm = (norm(config.projection_norm, size) for size in sizes)

    def forward(self, x_BSD: Tensor, sight: Sight, state: LayerState | None = None) -> Tensor:
        """out_BSD. Writes the new keys and values to `state` when one is handed in."""
        config = self.config
        batch, length, _ = x_BSD.shape
        q, k, v = self._projected(x_BSD)
        if config.rope is not None:
            turn = sight.rotation(config.rope, config.head_dim, x_BSD.dtype)
            q, k = rotate(q, turn), rotate(k, turn)
        if config.rotated_norm is not None:
            q, k = unit_rms(q, config.rotated_norm), unit_rms(k, config.rotated_norm)
        if config.temperature is not None:
            q = (q * sight.temperature(config.temperature)).to(q.dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        past = Past(k, v, sight.first_slot) if state is None else state.append(k, v)
        out_BHSA = attend(
            q,
            past,
            sight,
            window=config.window,
            chunk=config.chunk,
            scale=config.scale,
            sinks_H=self.sinks,
            bias_of=None if config.relative_bias is None else self._bias,
        )
        return self.o_proj(out_BHSA.transpose(1, 2).reshape(batch, length, -1))

    def _projected(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, H, A], keys and values [B, S, G, A], normalised and clipped."""
        return (self._queries(x_BSD), *self._keys_and_values(x_BSD))

    def _queries(self, x_BSD: Tensor) -> Tensor:
        return self._clipped(self._heads(self.q_proj(x_BSD), self.q_norm))

    def _keys_and_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._heads(self.k_proj(x_BSD), self.k_norm), self._heads(self.v_proj(x_BSD), None)
        return self._clipped(k), self._clipped(v)

    def _heads(self, part: Tensor, normalise: nn.Module | None) -> Tensor:
        """A projection cut into heads, normalised before or after that."""
        if normalise is not None and self.config.projection_norm is not None:
            part = normalise(part)
        part = part.unflatten(-1, (-1, self.config.head_dim))
        return normalise(part) if normalise is not None and self.config.head_norm is not None else part

    def _clipped(self, part: Tensor) -> Tensor:
        clip = self.config.clip
        return part if clip is None else part.clamp(-clip, clip)

    def _bias(self, sight: Sight, first_slot: int, num_slots: int) -> Tensor:
        """What is added to the scores of new tokens with these slots, [1, H, S, N]: its own, or an earlier layer's."""
        owner = self.config.relative_bias if isinstance(self.config.relative_bias, int) else self.layer
        key = (owner, first_slot, num_slots)
        if self.relative_bias is not None:
            device = sight.positions_BS.device
            slots_S = torch.arange(sight.positions_BS.shape[1], device=device) + sight.first_slot
            slots_N = torch.arange(num_slots, device=device) + first_slot
            sight.biases[key] = self.relative_bias(slots_S, slots_N, causal=sight.causal)
        return sight.biases[key]


def attend(
    q_BHSA: Tensor,
    past: Past,
    sight: Sight,
    *,
    window: int | None = None,
    chunk: int | None = None,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
    bias_of: Callable[[Sight, int, int], Tensor] | None = None,
) -> Tensor:
    """Softmax attention to what `sight`, `window` and `chunk` let each new token see, as wide as the values.

    scale, sinks_H: see `moesaic.kernels.attention.attention`. bias_of: makes its bias from a sight, the first visible
    slot and their number.
    """
    if sight.segments is not None:
        bundles = zip(*(sight.segments.cut(part) for part in (q_BHSA, past.keys, past.values)), strict=True)
        out = [
            attend(q, Past(k, v, 0), inner, window=window, chunk=chunk, scale=scale, sinks_H=sinks_H, bias_of=bias_of)
            for (q, k, v), inner in zip(bundles, sight.within, strict=True)
        ]
        return sight.segments.paste(out, q_BHSA)
    num_slots = past.keys.shape[2]
    masked = sight.needs_mask(window, num_slots, chunk)
    visible = sight.mask(window, past.first_slot, num_slots, chunk) if masked else None
    causal = sight.causal and not masked and q_BHSA.shape[2] > 1
    bias = None if bias_of is None else bias_of(sight, past.first_slot, num_slots)
    return attention(
        q_BHSA, past.keys, past.values, visible=visible, causal=causal, scale=scale, sinks_H=sinks_H, bias_BHSN=bias
    )
