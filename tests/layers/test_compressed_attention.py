"""DeepSeek-V4's attention: against transformers' layer alone, with its cache, padded, in documents; its gradients."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4Config
from transformers.cache_utils import DynamicCache
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention, DeepseekV4RotaryEmbedding

from moesaic.config import (
    CompressedAttentionConfig,
    CompressionConfig,
    EntryIndexerConfig,
    NormConfig,
    RopeConfig,
    YarnConfig,
)
from moesaic.errors import ConfigError
from moesaic.layers.attention import Sight
from moesaic.layers.compressed_attention import CompressedAttention
from moesaic.layers.compressed_state import CompressedState
from moesaic.layers.documents import number_documents
from moesaic.layers.indexer import leading

HIDDEN, CONTEXT = 22, 64
PLAIN = RopeConfig(theta=1e4, layout="interleaved", rotary_dim=6)
YARN = YarnConfig(factor=4.0, original_length=16, attention_factor=1.0)
STRETCHED = RopeConfig(theta=1.6e5, layout="interleaved", rotary_dim=6, scaling=YARN)
SLIDING = CompressedAttentionConfig(
    num_heads=6,
    head_dim=14,
    query_rank=11,
    window=5,
    output_groups=3,
    output_rank=7,
    rope=PLAIN,
    norm=NormConfig(eps=1e-5),
)


def indexed(ratio: int, top_k: int) -> CompressionConfig:
    """Enough heads that no entry is of no interest to all of them: zeros are ties, of which theirs picks any."""
    return CompressionConfig(
        ratio=ratio, overlap=True, indexer=EntryIndexerConfig(num_heads=9, head_dim=10, top_k=top_k)
    )


def compressed(compression: CompressionConfig, **fields: Any) -> CompressedAttentionConfig:
    return dataclasses.replace(SLIDING, **{"rope": STRETCHED, "compression": compression, **fields})


CONFIGS = {
    "sliding": SLIDING,
    "sliding, one group": dataclasses.replace(SLIDING, output_groups=1, window=3),
    "sparse 4": compressed(indexed(4, 3)),
    "sparse 3, narrow window": compressed(indexed(3, 2), window=2),
    "sparse 2, all chosen": compressed(indexed(2, 50), rope=dataclasses.replace(PLAIN, theta=3e4)),
    "sparse 1": compressed(indexed(1, 5)),
    "heavy 8": compressed(CompressionConfig(ratio=8)),
    "heavy 5, wide window": compressed(CompressionConfig(ratio=5), window=9),
    "heavy 1": compressed(CompressionConfig(ratio=1), window=1),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> CompressedAttentionConfig:
    return CONFIGS[request.param]


def layer(config: CompressedAttentionConfig, dtype: torch.dtype = torch.float32) -> CompressedAttention:
    made = CompressedAttention(config, HIDDEN).to(dtype)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in made.named_parameters():
        parameter.data.normal_(float("norm" in name), 0.4, generator=generator)
    return made


def drawn(batch: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(4), dtype=dtype)


def sight(length: int, first_slot: int = 0) -> Sight:
    return Sight(torch.arange(length)[None] + first_slot, first_slot)


def masked_sight(mask_BS: Tensor) -> Sight:
    return Sight((mask_BS.long().cumsum(1) - 1).clamp(min=0), valid_BN=mask_BS)


def state(config: CompressedAttentionConfig, batch: int, dtype: torch.dtype = torch.float32) -> CompressedState:
    return CompressedState(config, batch, CONTEXT, dtype, "cpu")


def assert_same(seen: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (seen - expected).abs().max() <= tolerance * expected.abs().max()


class Theirs:
    """transformers' layer of the same weights, with what its model would hand to it."""

    def __init__(self, ours: CompressedAttention) -> None:
        config, compression = ours.config, ours.config.compression
        kind = (
            "sliding" if compression is None else "compressed_sparse" if compression.overlap else "heavily_compressed"
        )
        kinds = ("compressed_sparse_attention", "heavily_compressed_attention")  # their caches ask for both
        rope: dict[str, Any] = {"rope_theta": config.rope.theta, "partial_rotary_factor": 6.01 / config.head_dim}
        yarn = {"factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.0}
        rope |= {"rope_type": "yarn", **yarn} if config.rope.scaling else {"rope_type": "default"}
        self.config = DeepseekV4Config(
            hidden_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=config.num_heads,
            head_dim=config.head_dim,
            q_lora_rank=config.query_rank,
            sliding_window=config.window,
            o_groups=config.output_groups,
            o_lora_rank=config.output_rank,
            layer_types=[f"{kind}_attention"],
            compress_rates=dict.fromkeys(kinds, compression.ratio if compression else 0),
            index_n_heads=config.indexer.num_heads if config.indexer else 1,
            index_head_dim=config.indexer.head_dim if config.indexer else 8,
            index_topk=config.indexer.top_k if config.indexer else 1,
            rms_norm_eps=config.norm.eps,
            max_position_embeddings=CONTEXT,
            rope_parameters={"main": rope, "compress": rope},
        )
        self.config._attn_implementation = "eager"
        self.layer = DeepseekV4Attention(self.config, 0).to(ours.sinks.dtype).eval()
        self.rotary = DeepseekV4RotaryEmbedding(self.config)
        self.layer.load_state_dict({their_name(name): value for name, value in ours.state_dict().items()})

    def __call__(self, x_BSD: Tensor, first: int = 0, cache: DynamicCache | None = None) -> Tensor:
        batch, length, _ = x_BSD.shape
        positions_BS = (torch.arange(length) + first).expand(batch, -1)
        turns = {kind: self.rotary(x_BSD, positions_BS, layer_type=kind) for kind in ("main", "compress")}
        kept = 0 if cache is None else min(first, self.config.sliding_window - 1)
        ahead_SN = positions_BS[0, :, None] - (torch.arange(kept + length) + first - kept)
        hidden_SN = (ahead_SN < 0) | (ahead_SN >= self.config.sliding_window)
        mask = torch.zeros(ahead_SN.shape, dtype=x_BSD.dtype).masked_fill(hidden_SN, float("-inf"))
        return self.layer(x_BSD, turns, positions_BS, mask.expand(batch, 1, -1, -1), cache)[0]


def their_name(ours: str) -> str:
    renamed = {
        "indexer.compressor.": "compressor.indexer.",
        "indexer.q_proj.": "compressor.indexer.q_b_proj.",
        "indexer.head_weights.": "compressor.indexer.scorer.weights_proj.",
    }
    for prefix, theirs in renamed.items():
        if ours.startswith(prefix):
            return theirs + ours.removeprefix(prefix)
    return ours


@torch.no_grad()
def test_it_is_theirs(config: CompressedAttentionConfig) -> None:
    ours = layer(config)
    theirs = Theirs(ours)
    for length in (1, 2, 4, 5, 7, 8, 16, 33):
        x = drawn(2, length)
        assert_same(ours(x, sight(length)), theirs(x))


@torch.no_grad()
def test_the_cache_changes_nothing(config: CompressedAttentionConfig) -> None:
    ours, x = layer(config), drawn(2, 26)
    expected = Theirs(ours)(x)
    for chunks in ([1] * 26, [7, 1, 1, 12, 5], [16, 1, 2, 3, 4], [3, 23]):
        kept, seen = state(config, 2), []
        for part in x.split(chunks, dim=1):
            seen.append(ours(part, sight(part.shape[1], sum(each.shape[1] for each in seen)), kept))
        assert_same(torch.cat(seen, dim=1), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.window > 1])
def test_theirs_with_their_cache_is_the_same(name: str) -> None:
    """But for windows of 1, of which their cache keeps the last window - 1 tokens as [-0:], which is all of them."""
    ours, x = layer(CONFIGS[name]), drawn(2, 26)
    theirs = Theirs(ours)
    cache, seen = DynamicCache(config=theirs.config), []
    for part in x.split([7, 1, 1, 12, 5], dim=1):
        seen.append(theirs(part, sum(each.shape[1] for each in seen), cache))
    assert_same(ours(x, sight(26)), torch.cat(seen, dim=1))


def rows_alone(ours: CompressedAttention, x_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Each row's tokens without its padding, one after the other."""
    rows = (x_D[kept][None] for x_D, kept in zip(x_BSD, mask_BS, strict=True) if kept.any())
    return torch.cat([ours(row, sight(row.shape[1]))[0] for row in rows])


MASKS = {
    "left": [[1] * 21, [0] * 4 + [1] * 17, [0] * 20 + [1], [0] * 21],
    "right": [[1] * 21, [1] * 17 + [0] * 4, [1] + [0] * 20, [0] * 21],
    "anywhere": [[1, 0, 0, 1, 1, 1, 0] * 3, [0, 1, 1] * 7, [1] * 9 + [0] * 6 + [1] * 6, [1, 0, 0] * 7],
}


@torch.no_grad()
@pytest.mark.parametrize("side", MASKS)
def test_padding_changes_nothing(config: CompressedAttentionConfig, side: str) -> None:
    ours, x, mask = layer(config), drawn(4, 21), torch.tensor(MASKS[side], dtype=torch.bool)
    seen = ours(x, masked_sight(mask))
    assert seen.isfinite().all()
    assert_same(seen[mask], rows_alone(ours, x, mask))


@torch.no_grad()
@pytest.mark.parametrize("side", MASKS)
def test_padding_changes_nothing_with_a_cache(config: CompressedAttentionConfig, side: str) -> None:
    """Rows that fill their windows at different steps; also those whose first step is padding alone."""
    ours, x, mask = layer(config), drawn(4, 21), torch.tensor(MASKS[side], dtype=torch.bool)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    for chunks in ([1] * 21, [9, 1, 6, 5]):
        kept, seen, first = state(config, 4), [], 0
        for length in chunks:
            end = first + length
            there = Sight(positions[:, first:end], first, mask[:, :end])
            seen.append(ours(x[:, first:end], there, kept))
            first = end
        assert_same(torch.cat(seen, dim=1)[mask], rows_alone(ours, x, mask))


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_documents_see_only_themselves(config: CompressedAttentionConfig, padded: bool) -> None:
    ours, x = layer(config), drawn(2, 25)
    ids = torch.tensor([[0] * 9 + [1] * 15 + [2], [3] * 2 + [4] * 4 + [3] * 19])
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[0, 3:5], mask[0, 10], mask[1, :2], mask[1, 6:8], mask[1, -3:] = False, False, False, False, False
    documents = number_documents(ids)
    seen = ours(x, Sight.of_documents(documents, mask if padded else None))
    for document in documents.unique():
        own = (documents == document) & mask
        if own.any():
            assert_same(seen[own], ours(x[own][None], sight(int(own.sum())))[0])


def test_gradients_are_theirs(config: CompressedAttentionConfig) -> None:
    ours, x = layer(config), drawn(2, 19)
    theirs, weights = Theirs(ours), drawn(2, 19).sin()
    x.requires_grad_()
    gradients = []
    for out in (ours(x, sight(19)), theirs(x)):
        x.grad = None
        (out * weights).sum().backward()
        gradients.append(x.grad)
    assert_same(*gradients)
    expected = dict(theirs.layer.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected[their_name(name)].grad
        if name.startswith("indexer."):
            assert parameter.grad is None and gradient is None, "it chooses, and weighs nothing"
        else:
            assert parameter.grad is not None and gradient is not None
            assert_same(parameter.grad, gradient)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["sliding", "sparse 3, narrow window", "heavy 5, wide window"])
def test_gradcheck(name: str, padded: bool) -> None:
    made, x = layer(CONFIGS[name], torch.float64), drawn(2, 8, torch.float64).requires_grad_()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :padded], mask[1, 8 - 2 * padded :] = False, False
    learned = [parameter for name, parameter in made.named_parameters() if not name.startswith("indexer.")]

    def tokens(x: Tensor, *_: Tensor) -> Tensor:
        return made(x, masked_sight(mask) if padded else sight(8))[mask]

    assert torch.autograd.gradcheck(tokens, (x, *learned), fast_mode=True)


def test_padding_has_no_gradient() -> None:
    made, x = layer(CONFIGS["sparse 4"]), drawn(2, 21).requires_grad_()
    mask = torch.tensor(MASKS["anywhere"][:2], dtype=torch.bool)
    made(x, masked_sight(mask))[mask].sum().backward()
    assert x.grad is not None and torch.equal(x.grad.any(-1), mask)


@torch.no_grad()
def test_what_is_kept_is_as_described(config: CompressedAttentionConfig) -> None:
    spec = config.state()
    assert (spec.kind, spec.can_rollback) == ("compressed", False)
    for length in (1, 4, 19):
        kept = state(config, 1)
        layer(config)(drawn(1, length), sight(length), kept)
        numbers = sum(part.numel() for part in (*kept.window.kept, *kept.pending.kept))
        numbers += int(kept.counts_B) * sum(part.shape[2] for part in kept.entries)
        assert spec.num_bytes(length, 2) == 2 * numbers
    kept.clear()
    x = drawn(1, 7)
    assert torch.equal(layer(config)(x, sight(7), kept), layer(config)(x, sight(7), state(config, 1)))


def test_entries_of_the_release_are_as_small_as_published() -> None:
    """Of the 43 layers of Flash 21 have one of 4 tokens, 20 one of 128; published: about 7% of V3.2's cache."""
    flash = dataclasses.replace(SLIDING, head_dim=512, rope=dataclasses.replace(PLAIN, rotary_dim=64))
    sparse = CompressionConfig(ratio=4, overlap=True, indexer=EntryIndexerConfig(num_heads=64, head_dim=128, top_k=512))
    specs = [dataclasses.replace(flash, compression=each).state() for each in (sparse, CompressionConfig(ratio=128))]
    grown = [spec.num_bytes(1_000_000, 1) - spec.num_bytes(1_000_000 - 1024, 1) for spec in specs]
    assert [each / 1024 for each in grown] == [(512 + 128) / 4, 512 / 128]


def test_flops_of_scores_count_what_is_attended_to() -> None:
    per_token, choosing = 4 * 6 * 14, 2 * 9 * (10 + 1)
    assert [SLIDING.score_flops(length) for length in (3, 5, 90)] == [3 * per_token, 5 * per_token, 5 * per_token]
    assert CONFIGS["heavy 8"].score_flops(90) == (5 + 11) * per_token
    assert CONFIGS["sparse 4"].score_flops(90) == (5 + 3) * per_token + 22 * choosing
    assert CONFIGS["sparse 4"].score_flops(9) == (5 + 2) * per_token + 2 * choosing


def test_of_equal_scores_the_first_lead() -> None:
    scores = torch.tensor([[0.0, 2.0, 0.0, 1.0, 0.0, -0.0], [3.0, 3.0, 3.0, 3.0, 3.0, 3.0], [-torch.inf] * 5 + [0.5]])
    assert leading(scores, 3).int().tolist() == [[1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1]]
    assert leading(scores, 6).all() and leading(scores, 9).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["sliding", "sparse 4", "heavy 8"])
def test_bfloat16_stays_close(name: str) -> None:
    made, x = layer(CONFIGS[name]), drawn(2, 19)
    expected = made(x, sight(19))
    assert_same(made.bfloat16()(x.bfloat16(), sight(19)).float(), expected, 0.1)


def test_what_cannot_be_is_refused() -> None:
    for message, fields in {
        "num_heads=6 is not a multiple of output_groups=4": {"output_groups": 4},
        "known: rms": {"norm": NormConfig(kind="layer")},
        "rotary_dim=16 is more than head_dim=14": {"rope": dataclasses.replace(PLAIN, rotary_dim=16)},
        "window=0": {"window": 0},
    }.items():
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(SLIDING, **fields)
    with pytest.raises(ConfigError, match="ratio=0"):
        CompressionConfig(ratio=0)
    with pytest.raises(ConfigError, match="12 dimensions turn, more than the indexer's head_dim=10"):
        compressed(indexed(4, 3), rope=dataclasses.replace(PLAIN, rotary_dim=12))
