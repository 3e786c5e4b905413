"""Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, eq. 9-19), within documents where a row holds several.

B batch, S new tokens, N visible slots, H heads, D hidden, Z latent, P the part of a head without positions, R the
turned part, A = P + R, V a head's value, I an index key.
"""

import torch
from torch import Tensor, nn

from moesaic.config import IndexerConfig
from moesaic.config.mla import INNER_NORM, MlaConfig
from moesaic.kernels.attention import attention
from moesaic.layers.attention import Sight, attend
from moesaic.layers.indexer import Indexer
from moesaic.layers.kv_cache import LayerState, Past
from moesaic.layers.norm import norm
from moesaic.layers.rope import rotate


class LatentAttention(nn.Module):
    """Softmax attention of H heads whose keys and values are projected from one latent a token.

    What is kept of a token is its normed latent, its turned key and, with an indexer, its index key. Keys and values
    are expanded from it for all visible tokens; where there are many more of these than new ones, queries are projected
    to the latent instead, and outputs from it (the absorption of sec. 2.1.2): the same products in another order.
    layer: its number in the stack, by which others know the tokens it chose.
    """

    def __init__(self, config: MlaConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        query_size, bias = config.num_heads * config.head_dim, config.bias
        if config.query_rank is None:
            self.q_proj = nn.Linear(hidden_size, query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, config.query_rank, bias=bias)
            self.q_a_norm = norm(INNER_NORM, config.query_rank)
            self.q_b_proj = nn.Linear(config.query_rank, query_size, bias=False)
        self.kv_a_proj = nn.Linear(hidden_size, config.latent_rank + config.rope_dim, bias=bias)
        self.kv_a_norm = norm(INNER_NORM, config.latent_rank)
        expanded = config.num_heads * (config.nope_dim + config.value_dim)
        self.kv_b_proj = nn.Linear(config.latent_rank, expanded, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.value_dim, hidden_size, bias=bias)
        self.indexer: Indexer | None = None
        if isinstance(config.indexer, IndexerConfig) and config.query_rank is not None:
            self.indexer = Indexer(config.indexer, hidden_size, config.query_rank)

    def forward(self, x_BSD: Tensor, sight: Sight, state: LayerState | None = None) -> Tensor:
        """out_BSD. Writes what is kept of the new tokens to `state` when one is handed in."""
        config = self.config
        batch, length, _ = x_BSD.shape
        turn = sight.rotation(config.rope, config.rope_dim, x_BSD.dtype)
        latent_BSZ = self.q_a_norm(self.q_a_proj(x_BSD)) if config.query_rank else None
        q_BSHE = self.q_proj(x_BSD) if latent_BSZ is None else self.q_b_proj(latent_BSZ)
        q_BSHP, q_BSHR = q_BSHE.unflatten(-1, (config.num_heads, -1)).split([config.nope_dim, config.rope_dim], dim=-1)
        q_BHSA = torch.cat([q_BSHP, rotate(q_BSHR, turn)], dim=-1).transpose(1, 2)
        past = self._remember(x_BSD, sight, state)
        chosen_B1SN = self._chosen(x_BSD, latent_BSZ, past, sight)
        past = Past(past.keys, past.values[..., : config.rope_dim], past.first_slot)
        attended = self._absorbed if self._absorbs(length, past.keys.shape[2]) else self._expanded
        out_BHSV = attended(q_BHSA, past, sight, chosen_B1SN)
        return self.o_proj(out_BHSV.transpose(1, 2).reshape(batch, length, -1))

    def _remember(self, x_BSD: Tensor, sight: Sight, state: LayerState | None) -> Past:
        """Latents [B, 1, N, Z], and turned keys beside index keys [B, 1, N, R + I], of past and new tokens."""
        config = self.config
        turn = sight.rotation(config.rope, config.rope_dim, x_BSD.dtype)
        latent_BSZ, key_BSR = self.kv_a_proj(x_BSD).split([config.latent_rank, config.rope_dim], dim=-1)
        latent_B1SZ = self.kv_a_norm(latent_BSZ)[:, None]
        keys = [rotate(key_BSR[:, :, None], turn).transpose(1, 2)]
        if self.indexer is not None:
            index_turn = sight.rotation(config.index_rope, self.indexer.config.head_dim, x_BSD.dtype)
            keys.append(self.indexer.keys(x_BSD, index_turn))
        both_B1S = torch.cat(keys, dim=-1) if len(keys) > 1 else keys[0]
        return Past(latent_B1SZ, both_B1S, sight.first_slot) if state is None else state.append(latent_B1SZ, both_B1S)

    def _chosen(self, x_BSD: Tensor, query_latent_BSZ: Tensor | None, past: Past, sight: Sight) -> Tensor | None:
        """The tokens that an indexer leaves to each query, bool [B, 1, S, N]; None: all that are visible."""
        config, num_slots = self.config, past.keys.shape[2]
        if self.indexer is None or query_latent_BSZ is None:
            return sight.choices[config.indexer] if isinstance(config.indexer, int) else None
        chosen_B1SN = None
        if num_slots > self.indexer.config.top_k:
            turn = sight.rotation(config.index_rope, self.indexer.config.head_dim, x_BSD.dtype)
            keys_B1NI = past.values[..., config.rope_dim :]
            visible_B1SN = sight.mask(None, past.first_slot, num_slots)
            chosen_B1SN = self.indexer.choose(x_BSD, query_latent_BSZ, keys_B1NI, turn, visible_B1SN)
        sight.choices[self.layer] = chosen_B1SN
        return chosen_B1SN

    def _expanded(self, q_BHSA: Tensor, past: Past, sight: Sight, chosen_B1SN: Tensor | None) -> Tensor:
        """Keys and values of every head and visible token, then attention as ever."""
        config = self.config
        expanded = self.kv_b_proj(past.keys[:, 0]).unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
        k_BHNP, v_BHNV = expanded.split([config.nope_dim, config.value_dim], dim=-1)
        k_BHNA = torch.cat([k_BHNP, past.values.expand(-1, config.num_heads, -1, -1)], dim=-1)
        return self._attend(q_BHSA, Past(k_BHNA, v_BHNV, past.first_slot), sight, chosen_B1SN)

    def _absorbed(self, q_BHSA: Tensor, past: Past, sight: Sight, chosen_B1SN: Tensor | None) -> Tensor:
        """Queries against the latents themselves, as if these were the keys and values of one shared head."""
        config = self.config
        weight_HEZ = self.kv_b_proj.weight.unflatten(0, (config.num_heads, -1))
        key_HPZ, value_HVZ = weight_HEZ.split([config.nope_dim, config.value_dim], dim=1)
        q_BHSP, q_BHSR = q_BHSA.split([config.nope_dim, config.rope_dim], dim=-1)
        q = torch.cat([q_BHSP @ key_HPZ, q_BHSR], dim=-1)
        # The turned keys ride along as values, so that both are as wide; what they give is cut off.
        both_B1N = torch.cat([past.keys, past.values], dim=-1)
        out = self._attend(q, Past(both_B1N, both_B1N, past.first_slot), sight, chosen_B1SN)
        return out[..., : config.latent_rank] @ value_HVZ.mT

    def _attend(self, q: Tensor, past: Past, sight: Sight, chosen_B1SN: Tensor | None) -> Tensor:
        if chosen_B1SN is None:
            return attend(q, past, sight, scale=self.config.scale)
        return attention(q, past.keys, past.values, visible=chosen_B1SN, scale=self.config.scale)

    def _absorbs(self, num_new: int, num_slots: int) -> bool:
        """Whether fewer products are needed that way: each is counted per head and visible token."""
        config = self.config
        expanding = config.latent_rank * (config.nope_dim + config.value_dim)
        attending = config.head_dim + config.value_dim
        absorbed = 2 * (config.latent_rank + config.rope_dim)
        return num_slots > num_new and num_new * absorbed < expanding + num_new * attending
