"""Latent attention: both orders of its products, documents, gradients, and tokens that an indexer chooses."""

import dataclasses

import pytest
import torch
from torch import Tensor

from moesaic.config import IndexerConfig, MlaConfig, RopeConfig, YarnConfig
from moesaic.layers.attention import MASKED_LENGTH, Sight
from moesaic.layers.kv_cache import FullState
from moesaic.layers.mla import LatentAttention

CONFIG = MlaConfig(num_heads=3, query_rank=11, latent_rank=19, nope_dim=7, rope_dim=4, value_dim=5)
INDEXER = IndexerConfig(num_heads=9, head_dim=10, top_k=4)
HIDDEN = 13


def layer(config: MlaConfig = CONFIG, dtype: torch.dtype = torch.float64) -> LatentAttention:
    made = LatentAttention(config, HIDDEN, 0).to(dtype)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in made.named_parameters():
        parameter.data.normal_(float("norm.weight" in name), 0.3, generator=generator)
    return made


def drawn(batch: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(4), dtype=dtype)


def sight(length: int, first_slot: int = 0) -> Sight:
    return Sight(torch.arange(length)[None] + first_slot, first_slot)


@torch.no_grad()
@pytest.mark.parametrize("indexer", [None, INDEXER])
@pytest.mark.parametrize("length", [1, 4])
def test_both_orders_of_the_products_are_the_same(indexer: IndexerConfig | None, length: int) -> None:
    made = layer(dataclasses.replace(CONFIG, indexer=indexer))
    x = drawn(2, 12 + length)
    out = {}
    for absorbs in (False, True):
        beside = CONFIG.rope_dim + (indexer.head_dim if indexer else 0)
        state = FullState((2, 1, 20, CONFIG.latent_rank), torch.float64, "cpu", beside)
        made._absorbs = lambda *_, absorbs=absorbs: absorbs  # pyright: ignore[reportAttributeAccessIssue]
        made(x[:, :12], sight(12), state)
        out[absorbs] = made(x[:, 12:], sight(length, 12), state)
    assert torch.allclose(out[True], out[False], atol=1e-12)
    assert torch.allclose(out[True], made(x, sight(12 + length))[:, 12:], atol=1e-12)


def test_the_cheaper_order_is_taken() -> None:
    released = MlaConfig(num_heads=128, query_rank=1536, latent_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    made = LatentAttention(dataclasses.replace(released, num_heads=1), HIDDEN, 0)
    # Per head and visible token: 2 * 512 * (128 + 128) products to expand against 2 * (2 * 576 - 320) a new token.
    assert [made._absorbs(new, 10_000) for new in (1, 157, 158, 10_000)] == [True, True, False, False]


@torch.no_grad()
@pytest.mark.parametrize("indexer", [None, INDEXER])
@pytest.mark.parametrize("length", [20, MASKED_LENGTH + 40])
def test_documents_see_only_themselves(indexer: IndexerConfig | None, length: int) -> None:
    made, x = layer(dataclasses.replace(CONFIG, indexer=indexer)), drawn(2, length)
    ends = [[7, length], [3, 16, length]]
    documents = torch.zeros(2, length, dtype=torch.long)
    number = 0
    for row, row_ends in enumerate(ends):
        for start, end in zip([0, *row_ends], row_ends, strict=False):
            documents[row, start:end] = number
            number += 1
    seen = made(x, Sight.of_documents(documents, None))
    for row, row_ends in enumerate(ends):
        for start, end in zip([0, *row_ends], row_ends, strict=False):
            alone = made(x[row : row + 1, start:end], sight(end - start))
            assert torch.allclose(seen[row, start:end], alone[0], atol=1e-12)


@pytest.mark.parametrize("query_rank", [None, 6])
def test_gradcheck(query_rank: int | None) -> None:
    config = MlaConfig(num_heads=2, query_rank=query_rank, latent_rank=5, nope_dim=3, rope_dim=2, value_dim=6)
    made, x = layer(config), drawn(1, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: made(x, sight(3)), (x, *made.parameters()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_as_described(dtype: torch.dtype) -> None:
    for config in (CONFIG, dataclasses.replace(CONFIG, indexer=INDEXER)):
        spec = config.state()
        state = FullState((1, 1, 8, 19), dtype, "cpu", spec.elements_per_token - 19)
        layer(config, dtype)(drawn(1, 5, dtype), sight(5), state)
        assert (spec.kind, state.length) == ("latent", 5)
        assert state.keys[0, 0, 0].numel() + state.values[0, 0, 0].numel() == spec.elements_per_token
    assert dataclasses.replace(CONFIG, indexer=INDEXER).state().elements_per_token == 19 + 4 + 10


def test_the_scale_has_the_square_of_yarns_correction() -> None:
    """arXiv:2405.04434, sec. 3.1.4, as released: (0.1 ln 40 + 1)^2 = 1.8739 for DeepSeek-V3."""
    yarn = YarnConfig(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0)
    scaled = dataclasses.replace(CONFIG, rope=RopeConfig(layout="interleaved", scaling=yarn))
    assert scaled.scale / CONFIG.scale == pytest.approx(1.8739, abs=1e-4)
    assert CONFIG.scale == 11**-0.5


@torch.no_grad()
def test_short_contexts_need_no_choice() -> None:
    """With as many tokens as an indexer chooses, it is DeepSeek-V3's attention, to the bit."""
    sparse, x = layer(dataclasses.replace(CONFIG, indexer=INDEXER)), drawn(2, 9)
    plain = LatentAttention(CONFIG, HIDDEN, 0).double()
    plain.load_state_dict({name: value for name, value in sparse.state_dict().items() if "indexer" not in name})
    assert torch.equal(sparse(x[:, :4], sight(4)), plain(x[:, :4], sight(4)))
    differs_S = (sparse(x, sight(9)) - plain(x, sight(9))).abs().amax((0, 2)) > 1e-6
    assert differs_S.tolist() == [False] * 4 + [True] * 5


@torch.no_grad()
def test_the_indexer_by_its_equation() -> None:
    """arXiv:2512.02556, eq. 1: the k visible tokens with the highest sum of w relu(q k)."""
    made, x = layer(dataclasses.replace(CONFIG, indexer=INDEXER), torch.float32), drawn(1, 9, torch.float32)
    seen = sight(9)
    made(x, seen)
    chosen = seen.choices[0]
    assert chosen is not None
    state = made.state_dict()
    latent = made.q_a_norm(x @ state["q_a_proj.weight"].T)
    q = (latent @ state["indexer.q_proj.weight"].T).view(9, 9, 10)
    k = x[0] @ state["indexer.k_proj.weight"].T
    k = torch.nn.functional.layer_norm(k, (10,), state["indexer.k_norm.weight"], state["indexer.k_norm.bias"], 1e-6)
    weights = x[0] @ state["indexer.head_weights.weight"].T
    for t in range(9):
        scores = []
        for s in range(t + 1):
            products = [float(turned(q[t, j], t) @ turned(k[s], s)) for j in range(9)]
            scores.append(sum(float(weights[t, j]) * max(product, 0.0) for j, product in enumerate(products)))
        best = sorted(range(t + 1), key=lambda s, scores=scores: -scores[s])[:4]
        assert chosen[0, 0, t].nonzero()[:, 0].tolist() == sorted(best)


def turned(head: Tensor, position: int) -> Tensor:
    """The first 4 of 10 dimensions turned, 0 with 2 and 1 with 3."""
    angles = position * 10_000.0 ** (-torch.arange(0, 4, 2) / 4)
    first, second = head[:2], head[2:4]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin(), head[4:]]
    )
