"""Grouped-query attention, full or over a window, within documents where a row holds several.

B batch, S new tokens, N visible slots, H heads, G key/value heads, A head dim, D hidden.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from moesaic.config import AttentionConfig, RopeConfig
from moesaic.kernels.attention import attention
from moesaic.layers.documents import Segments, positions, segments
from moesaic.layers.kv_cache import LayerState, Past
from moesaic.layers.norm import RmsNorm
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
    """

    positions_BS: Tensor
    first_slot: int = 0
    valid_BN: Tensor | None = None
    documents_BN: Tensor | None = None
    segments: Segments | None = None
    _rotations: dict[tuple[RopeConfig, int, torch.dtype], Rotation] = field(default_factory=dict)
    _masks: dict[tuple[int | None, int, int], Tensor] = field(default_factory=dict)

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
            self._rotations[key] = rotation(rope, head_dim, self.positions_BS, dtype)
        return self._rotations[key]

    def needs_mask(self, window: int | None, num_slots: int) -> bool:
        """Whether plain causality (or, for one new token, no mask at all) does not say it all."""
        new = self.positions_BS.shape[1]
        in_window = window is None or num_slots <= window
        whole = self.valid_BN is None and self.documents_BN is None
        return not (whole and in_window and new in (1, num_slots))

    def mask(self, window: int | None, first_slot: int, num_slots: int) -> Tensor:
        """What each new token sees, bool [B or 1, 1, S, N].

        A padding token sees itself: a row without any visible slot would turn into NaN and spread.
        """
        key = (window, first_slot, num_slots)
        if key not in self._masks:
            device = self.positions_BS.device
            query_S1 = torch.arange(self.positions_BS.shape[1], device=device)[:, None] + self.first_slot
            slot_N = torch.arange(num_slots, device=device) + first_slot
            visible = slot_N <= query_S1
            if window is not None:
                visible = visible & (slot_N > query_S1 - window)
            visible = visible[None, None]
            if self.documents_BN is not None:  # new tokens only: there is no past
                visible = visible & (self.documents_BN[:, None, :, None] == self.documents_BN[:, None, None, :])
            if self.valid_BN is not None:
                valid_BN = self.valid_BN[:, first_slot : first_slot + num_slots]
                visible = visible & (valid_BN[:, None, None, :] | (slot_N == query_S1))
            self._masks[key] = visible
        return self._masks[key]


class Attention(nn.Module):
    """Softmax attention of H query heads over G shared key/value heads (arXiv:2305.13245), with rotary positions."""

    def __init__(self, config: AttentionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        query_size = config.num_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, key_value_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, key_value_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, hidden_size, bias=config.output_bias)
        self.q_norm = RmsNorm(config.head_norm, config.head_dim) if config.head_norm else None
        self.k_norm = RmsNorm(config.head_norm, config.head_dim) if config.head_norm else None

    def forward(self, x_BSD: Tensor, sight: Sight, state: LayerState | None = None) -> Tensor:
        """out_BSD. Writes the new keys and values to `state` when one is handed in."""
        config = self.config
        batch, length, _ = x_BSD.shape
        q = self.q_proj(x_BSD).view(batch, length, config.num_heads, config.head_dim)
        k = self.k_proj(x_BSD).view(batch, length, config.num_key_value_heads, config.head_dim)
        v = self.v_proj(x_BSD).view(batch, length, config.num_key_value_heads, config.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        turn = sight.rotation(config.rope, config.head_dim, x_BSD.dtype)
        q, k, v = rotate(q, turn).transpose(1, 2), rotate(k, turn).transpose(1, 2), v.transpose(1, 2)
        past = Past(k, v, sight.first_slot) if state is None else state.append(k, v)
        out_BHSA = self._attend(q, past, sight)
        return self.o_proj(out_BHSA.transpose(1, 2).reshape(batch, length, -1))

    def _attend(self, q_BHSA: Tensor, past: Past, sight: Sight) -> Tensor:
        if sight.segments is not None:
            bundles = zip(*(sight.segments.cut(part) for part in (q_BHSA, past.keys, past.values)), strict=True)
            out = [
                self._attend(q, Past(k, v, 0), inner) for (q, k, v), inner in zip(bundles, sight.within, strict=True)
            ]
            return sight.segments.paste(out, q_BHSA)
        num_slots = past.keys.shape[2]
        masked = sight.needs_mask(self.config.window, num_slots)
        visible = sight.mask(self.config.window, past.first_slot, num_slots) if masked else None
        causal = not masked and q_BHSA.shape[2] > 1
        return attention(q_BHSA, past.keys, past.values, visible=visible, causal=causal)
