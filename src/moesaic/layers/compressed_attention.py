"""The attention of DeepSeek-V4 (its technical report, sec. 2.3), within documents where a row holds several.

B batch, S new tokens, N tokens at hand (kept ones, then new ones), M entries, H heads, A head dim, D hidden, Z the
queries' latent, J index heads, I their dim, g output groups.
"""

import torch
from torch import Tensor, nn

from moesaic.config import CompressedAttentionConfig, CompressionConfig, EntryIndexerConfig, NormConfig
from moesaic.kernels.attention import attention
from moesaic.layers.attention import Sight
from moesaic.layers.compressed_state import CompressedState
from moesaic.layers.compressor import Compressor
from moesaic.layers.indexer import index_scores, leading
from moesaic.layers.norm import norm, unit_rms
from moesaic.layers.rope import Rotation, rotate_last, rotation
from moesaic.layers.windows import Places, Windows, full_windows


class EntryIndexer(nn.Module):
    """Chooses the entries that each query attends to, by entries of its own (sec. 2.3.1, eq. 13-17).

    No gradient of the language model's loss reaches it: it chooses, and weighs nothing.
    """

    def __init__(
        self,
        config: EntryIndexerConfig,
        compression: CompressionConfig,
        hidden_size: int,
        query_rank: int,
        norm_config: NormConfig,
    ) -> None:
        super().__init__()
        self.config = config
        self.compressor = Compressor(compression, config.head_dim, hidden_size, norm_config)
        self.q_proj = nn.Linear(query_rank, config.num_heads * config.head_dim, bias=False)
        self.head_weights = nn.Linear(hidden_size, config.num_heads, bias=False)

    @torch.no_grad()
    def source(self, x_BSD: Tensor) -> Tensor:
        """As the compressor's."""
        return self.compressor.source(x_BSD)

    @torch.no_grad()
    def forward(self, source_BNC: Tensor, windows: Windows, turn: Rotation) -> Tensor:
        """keys_BMI, as the compressor makes entries."""
        return self.compressor(source_BNC, windows, turn)

    @torch.no_grad()
    def choose(
        self, x_BSD: Tensor, latent_BSZ: Tensor, keys_BMI: Tensor, turn: Rotation, visible_BSM: Tensor
    ) -> Tensor:
        """Which of the visible entries each query attends to, bool [B, S, M]; of equal ones the earlier."""
        config = self.config
        if keys_BMI.shape[1] <= config.top_k:
            return visible_BSM
        q_BSJI = rotate_last(self.q_proj(latent_BSZ).unflatten(-1, (config.num_heads, config.head_dim)), turn)
        scores_BSM = index_scores(q_BSJI, keys_BMI, x_BSD, self.head_weights.weight)
        return leading(scores_BSM.masked_fill(~visible_BSM, float("-inf")), config.top_k) & visible_BSM


class CompressedAttention(nn.Module):
    """Softmax attention of H heads to the last tokens and to entries that stand for windows of them.

    A token's one vector, normed and turned, is key and value of all heads; so is an entry. Since values are turned too,
    outputs are turned back by the query's position: what they hold of a value is then turned by its distance alone.
    """

    def __init__(self, config: CompressedAttentionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        query_size, output_size = config.num_heads * config.head_dim, config.output_groups * config.output_rank
        self.sinks = nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32))
        self.q_a_proj = nn.Linear(hidden_size, config.query_rank, bias=False)
        self.q_a_norm = norm(config.norm, config.query_rank)
        self.q_b_proj = nn.Linear(config.query_rank, query_size, bias=False)
        self.kv_proj = nn.Linear(hidden_size, config.head_dim, bias=False)
        self.kv_norm = norm(config.norm, config.head_dim)
        self.o_a_proj = nn.Linear(query_size // config.output_groups, output_size, bias=False)
        self.o_b_proj = nn.Linear(output_size, hidden_size, bias=False)
        self.compressor: Compressor | None = None
        self.indexer: EntryIndexer | None = None
        compression = config.compression
        if compression is not None:
            self.compressor = Compressor(compression, config.head_dim, hidden_size, config.norm)
            if compression.indexer is not None:
                self.indexer = EntryIndexer(
                    compression.indexer, compression, hidden_size, config.query_rank, config.norm
                )

    def forward(self, x_BSD: Tensor, sight: Sight, state: CompressedState | None = None) -> Tensor:
        """out_BSD. Writes what is kept of the new tokens to `state` when one is handed in."""
        config, places = self.config, _places(sight)
        turn = sight.rotation(config.rope, config.head_dim, x_BSD.dtype)
        latent_BSZ = self.q_a_norm(self.q_a_proj(x_BSD))
        q_BSHA = unit_rms(self.q_b_proj(latent_BSZ).unflatten(-1, (config.num_heads, config.head_dim)), config.norm)
        kv_BNA, visible_BSN = self._tokens(x_BSD, turn, places, state)
        if config.compression is not None:
            (entries_BMA, *keys), seen_BSM = self._entries(x_BSD, config.compression, places, state)
            if self.indexer is not None:
                seen_BSM = self.indexer.choose(x_BSD, latent_BSZ, keys[0], turn, seen_BSM)
            kv_BNA = torch.cat([kv_BNA, entries_BMA], dim=1)
            rows = max(len(visible_BSN), len(seen_BSM))
            visible_BSN = torch.cat([visible_BSN.expand(rows, -1, -1), seen_BSM.expand(rows, -1, -1)], dim=2)
        q_BHSA, kv_B1NA = rotate_last(q_BSHA, turn).transpose(1, 2), kv_BNA[:, None]
        out_BHSA = attention(q_BHSA, kv_B1NA, kv_B1NA, visible=visible_BSN[:, None], sinks_H=self.sinks)
        return self._projected(rotate_last(out_BHSA.transpose(1, 2), turn.back))

    def _tokens(
        self, x_BSD: Tensor, turn: Rotation, places: Places, state: CompressedState | None
    ) -> tuple[Tensor, Tensor]:
        """Keys that are values of the tokens at hand, [B, N, A], and which of them each new one sees, [B, S, N]."""
        kv_BNA = rotate_last(self.kv_norm(self.kv_proj(x_BSD))[:, :, None], turn)[:, :, 0]
        positions_BN = places.positions_BS
        if state is not None:
            positions_BN, (kv_BNA,) = state.window.extend(positions_BN, (kv_BNA,))
        return kv_BNA, places.sees_tokens(positions_BN, self.config.window)

    def _entries(
        self, x_BSD: Tensor, compression: CompressionConfig, places: Places, state: CompressedState | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The entries so far, the indexer's beside those that are attended to, and which each new token sees."""
        config, ratio = self.config, compression.ratio
        makers = [maker for maker in (self.compressor, self.indexer) if maker is not None]
        sources = tuple(maker.source(x_BSD) for maker in makers)
        positions_BN = places.positions_BS
        if state is not None:
            positions_BN, sources = state.pending.extend(positions_BN, sources)
        windows = full_windows(positions_BN, ratio, x_BSD.shape[1], places.documents_BS)
        turn = rotation(config.rope, config.head_dim, windows.numbers_BM * ratio, x_BSD.dtype)
        entries = tuple(maker(source, windows, turn) for maker, source in zip(makers, sources, strict=True))
        if state is None:
            seen_BSM = places.sees_windows(windows.numbers_BM, ratio, windows.documents_BM)
            return entries, seen_BSM & windows.real_BM[:, None]
        entries = state.add_entries(entries, windows.real_BM)
        numbers_BM = torch.arange(entries[0].shape[1], device=x_BSD.device)[None]
        return entries, places.sees_windows(numbers_BM, ratio)

    def _projected(self, heads_BSHA: Tensor) -> Tensor:
        """The heads in groups, each by a matrix of its own, then all together."""
        groups = self.config.output_groups
        weight_grC = self.o_a_proj.weight.unflatten(0, (groups, -1))
        grouped_BSgC = heads_BSHA.flatten(2).unflatten(2, (groups, -1))
        return self.o_b_proj(torch.einsum("bsgc,grc->bsgr", grouped_BSgC, weight_grC).flatten(2))


def _places(sight: Sight) -> Places:
    if sight.valid_BN is None:
        return Places(sight.positions_BS, sight.documents_BN)
    valid_BS = sight.valid_BN[:, sight.first_slot : sight.first_slot + sight.positions_BS.shape[1]]
    return Places(sight.positions_BS.expand_as(valid_BS).masked_fill(~valid_BS, -1), sight.documents_BN)
