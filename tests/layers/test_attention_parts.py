"""What attention can be made of (sinks, chunks, temperature, ...): packed documents, padding, caches, who sees whom.

Two layers of the same attention in fp64, without experts, so that attention is all there is to be wrong.
"""

import dataclasses
from typing import Any

import pytest
import torch

from moesaic.config import (
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
    StackConfig,
    TemperatureConfig,
)
from moesaic.errors import ConfigError
from moesaic.layers import attention as attention_layer
from moesaic.layers.kv_cache import KeyValueCache
from moesaic.models.decoder import Decoder
from tests.tiny import lively

PARTS: dict[str, dict[str, Any]] = {
    "sinks": {"sinks": True},
    "sinks and a window": {"sinks": True, "window": 3},
    "sinks, chunks and a scale": {"sinks": True, "chunk": 4, "scale": 0.7},
    "chunks of interleaved positions": {"chunk": 3, "rope": RopeConfig(layout="interleaved")},
    "temperature without positions": {"rope": None, "temperature": TemperatureConfig(interval=3, scale=0.8)},
    "norm after the rotation": {"rotated_norm": NormConfig(), "chunk": 5},
}
LENGTHS = [5, 9, 1, 6]


@pytest.fixture(params=PARTS)
def model(request: pytest.FixtureRequest) -> Decoder:
    return build(**PARTS[request.param])


def build(**parts: Any) -> Decoder:
    attention = AttentionConfig(num_heads=4, num_key_value_heads=2, head_dim=6, **parts)
    layer = LayerConfig(attention=attention, feed_forward=MlpConfig(intermediate_size=7))
    config = ModelConfig(
        family="moesaic", vocab_size=31, hidden_size=10, context_length=64, decoder=StackConfig(layers=(layer,) * 2)
    )
    return lively(config).double()


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("masked_length", [512, 4])
def test_packed_documents_are_as_alone(model: Decoder, masked_length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, by a mask and cut out."""
    monkeypatch.setattr(attention_layer, "MASKED_LENGTH", masked_length)
    ids_BS = token_ids(1, sum(LENGTHS))
    documents_BS = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    packed = model(ids_BS, document_ids_BS=documents_BS)
    alone = torch.cat([model(part) for part in ids_BS.split(LENGTHS, dim=1)], dim=1)
    assert torch.allclose(packed, alone, rtol=1e-9, atol=1e-11)
    slope = torch.linspace(-1, 1, packed.numel(), dtype=packed.dtype).view(packed.shape)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(packed, parameters, slope), torch.autograd.grad(alone, parameters, slope), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(model: Decoder) -> None:
    ids_BS = token_ids(3, 13)
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    mask_BS[1, :4] = False
    mask_BS[2, -5:] = False
    seen = model(ids_BS, mask_BS)
    for row in range(3):
        assert torch.allclose(seen[row][mask_BS[row]], model(ids_BS[row][mask_BS[row]][None])[0], rtol=1e-9, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 17, [7, 1, 1, 8], [16, 1], [2, 15]])
@pytest.mark.parametrize("padding", [0, 2])
def test_a_cache_changes_nothing(model: Decoder, chunks: list[int], padding: int) -> None:
    ids_BS = token_ids(2, 17)
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    mask_BS[1, :padding] = False
    cache = KeyValueCache(model.config, batch_size=2, max_length=17, dtype=torch.float64)
    pieces = zip(ids_BS.split(chunks, dim=1), mask_BS.split(chunks, dim=1), strict=True)
    seen = torch.cat([model(ids, mask, cache=cache) for ids, mask in pieces], dim=1)
    assert torch.allclose(seen[mask_BS], model(ids_BS, mask_BS)[mask_BS], rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_a_chunk_ends_what_can_be_seen() -> None:
    """In one layer: a changed token reaches the later ones of its chunk, and no others."""
    whole = build(chunk=4)
    model = Decoder(
        dataclasses.replace(whole.config, decoder=StackConfig(layers=whole.config.layers[:1])), dtype=torch.float64
    )
    model.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if "layers.1." not in name})
    ids_BS = token_ids(1, 11)
    for changed in range(11):
        other_BS = ids_BS.clone()
        other_BS[0, changed] = (other_BS[0, changed] + 1) % 31
        differs = (model(ids_BS) != model(other_BS)).any(-1)[0].nonzero()[:, 0].tolist()
        assert differs == list(range(changed, min(11, (changed // 4 + 1) * 4)))


def test_a_cache_of_chunks_keeps_no_more_than_one() -> None:
    config = build(chunk=4).config
    assert [spec.window for spec in config.states()] == [4, 4]
    assert config.state_bytes(50) == config.state_bytes(4)
    assert config.layers[0].attention.score_flops(50) == config.layers[0].attention.score_flops(4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 4, "chunk": 4}, "window=4 and chunk=4; a layer looks at one of them"),
        ({"chunk": 0}, "chunk=0 in AttentionConfig; it must be a whole number above 0"),
        ({"scale": 0.0}, "it must be above 0 and finite"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttentionConfig(num_heads=4, num_key_value_heads=2, head_dim=6, **fields)


def test_a_temperature_without_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="interval=0 in TemperatureConfig"):
        TemperatureConfig(interval=0)
