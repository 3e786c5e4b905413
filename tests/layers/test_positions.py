"""Relative biases and sinusoids, against slow readings of their sources and transformers' own."""

import math

import pytest
import torch
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSinusoidalPositionalEmbedding
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersAttention

from moesaic.config import AttentionConfig, RelativeBiasConfig, SinusoidConfig
from moesaic.errors import ConfigError
from moesaic.layers.attention import Attention, Sight
from moesaic.layers.documents import number_documents
from moesaic.layers.positions import RelativeBias, relative_buckets, sinusoids

SIZES = [(32, 128), (8, 10), (4, 3), (10, 64), (6, 1000)]


def slow_bucket(distance: int, num_buckets: int, max_distance: int, *, causal: bool) -> int:
    """T5, sec. 2.1, in words: near distances one bucket each, then logarithmically, the last for all beyond."""
    first = 0
    if not causal:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
    elif distance > 0:
        return 0
    distance, exact = abs(distance), num_buckets // 2
    if distance < exact:
        return first + distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return first + min(num_buckets - 1, exact + int(share * (num_buckets - exact) + 1e-6))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), SIZES)
def test_buckets(num_buckets: int, max_distance: int, causal: bool) -> None:
    distances = torch.arange(-200, 201)
    config = RelativeBiasConfig(num_buckets=num_buckets, max_distance=max_distance)
    seen = relative_buckets(distances, config, causal=causal)
    theirs = SwitchTransformersAttention._relative_position_bucket(
        distances, bidirectional=not causal, num_buckets=num_buckets, max_distance=max_distance
    )
    assert torch.equal(seen, theirs)
    slow = [slow_bucket(int(each), num_buckets, max_distance, causal=causal) for each in distances]
    # On the bound of a bucket fp32 may stand on either side.
    assert (seen != torch.tensor(slow)).sum() <= 2
    assert seen.min() == 0 and seen.max() == num_buckets - 1


@pytest.mark.parametrize("causal", [True, False])
def test_a_bias_depends_on_the_distance_alone(causal: bool) -> None:
    bias = RelativeBias(RelativeBiasConfig(num_buckets=8, max_distance=12), 3)
    torch.nn.init.normal_(bias.weight)
    slots = torch.arange(9)
    whole = bias(slots, slots, causal=causal)
    assert whole.shape == (1, 3, 9, 9)
    assert torch.equal(whole, bias(slots + 100, slots + 100, causal=causal))
    assert torch.equal(whole[:, :, 5:], bias(slots[5:], slots, causal=causal))
    assert torch.equal(whole[0, :, 4, 2], bias.weight[2])
    later = whole[0, :, 2, 4]
    assert torch.equal(later, bias.weight[0] if causal else bias.weight[4 + 2])


def attention() -> Attention:
    bias = RelativeBiasConfig(num_buckets=8, max_distance=12)
    config = AttentionConfig(num_heads=4, num_key_value_heads=2, head_dim=5, rope=None, relative_bias=bias)
    layer = Attention(config, 12)
    generator = torch.Generator().manual_seed(4)
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.5, generator=generator)
    return layer


def slow_attention(layer: Attention, x_SD: torch.Tensor, causal: bool) -> torch.Tensor:
    """One row, head by head and token by token."""
    config, bias = layer.config, layer.relative_bias
    assert bias is not None
    q, k, v = (each(x_SD).unflatten(-1, (-1, config.head_dim)) for each in (layer.q_proj, layer.k_proj, layer.v_proj))
    out = torch.zeros(len(x_SD), config.num_heads, config.head_dim)
    for head in range(config.num_heads):
        for token in range(len(x_SD)):
            seen = range(token + 1) if causal else range(len(x_SD))
            buckets = [slow_bucket(other - token, 8, 12, causal=causal) for other in seen]
            scores = [
                (q[token, head] @ k[other, head // 2]) / config.head_dim**0.5 + bias.weight[bucket, head]
                for other, bucket in zip(seen, buckets, strict=True)
            ]
            shares = torch.stack(scores).softmax(0)
            out[token, head] = sum(share * v[other, head // 2] for share, other in zip(shares, seen, strict=True))
    return layer.o_proj(out.flatten(1))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_attention_with_biases_is_the_slow_one(causal: bool) -> None:
    layer, x_BSD = attention(), torch.randn(2, 11, 12, generator=torch.Generator().manual_seed(5))
    sight = Sight(torch.arange(11)[None])
    sight.causal = causal
    expected = torch.stack([slow_attention(layer, x_SD, causal) for x_SD in x_BSD])
    assert torch.allclose(layer(x_BSD, sight), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [20, 700])
def test_documents_of_one_row_have_their_own_distances(length: int) -> None:
    """Short rows by a mask, long ones document by document."""
    layer, x_BSD = attention(), torch.randn(1, length, 12, generator=torch.Generator().manual_seed(5))
    first = length // 3
    documents_BS = number_documents((torch.arange(length) >= first).long()[None])
    seen = layer(x_BSD, Sight.of_documents(documents_BS, None))
    parts = [x_BSD[:, :first], x_BSD[:, first:]]
    apart = [layer(part, Sight(torch.arange(part.shape[1])[None])) for part in parts]
    assert torch.allclose(seen, torch.cat(apart, dim=1), atol=1e-5)


def test_biases_have_a_gradient() -> None:
    layer, x_BSD = attention().double(), torch.randn(2, 7, 12, dtype=torch.double)
    bias = layer.relative_bias
    assert bias is not None

    def loss(weight: torch.Tensor) -> torch.Tensor:
        bias.weight.data.copy_(weight)
        return layer(x_BSD, Sight(torch.arange(7)[None])).square().sum()

    start = bias.weight.detach().clone()
    loss(start).backward()
    assert bias.weight.grad is not None
    for at in ((0, 0), (2, 3), (5, 1)):
        step = torch.zeros_like(start)
        step[at] = 1e-6
        with torch.no_grad():
            slope = (loss(start + step) - loss(start - step)) / 2e-6
        assert bias.weight.grad[at] == pytest.approx(slope.item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("size", [6, 7, 48])
def test_sinusoids_are_theirs(size: int) -> None:
    theirs = NllbMoeSinusoidalPositionalEmbedding(30, size, padding_idx=1)
    ids_BS = torch.full((2, 9), 5)
    seen = sinusoids(SinusoidConfig(first=2), torch.arange(9)[None], size)
    assert torch.equal(seen.expand(2, -1, -1), theirs(ids_BS))


def test_sinusoids_are_the_formula() -> None:
    seen = sinusoids(SinusoidConfig(first=3, base=100.0), torch.tensor([[4]]), 6)[0, 0]
    angles = [7.0, 7 / 100**0.5, 7 / 100]
    expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
    assert torch.allclose(seen, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        (RelativeBiasConfig, {"num_buckets": 3}, "num_buckets=3 .* even and at least 4"),
        (RelativeBiasConfig, {"num_buckets": 8, "max_distance": 4}, "max_distance=4 .* above 4"),
        (SinusoidConfig, {"first": -1}, "first=-1"),
        (SinusoidConfig, {"base": 1.0}, "base=1.0"),
    ],
)
def test_impossible_positions_are_refused(part: type, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        part(**settings)
