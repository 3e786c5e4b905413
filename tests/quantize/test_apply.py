"""Models with packed weights: what they compute is what their rounded weights compute."""

import copy

import pytest
import torch
from torch import nn

from moesaic.config import MlpConfig, ModelConfig
from moesaic.engine.generate import generate
from moesaic.errors import CheckpointError, ConfigError
from moesaic.experts.grouped import GroupedExperts
from moesaic.experts.packed import PackedExperts, PackedLinear
from moesaic.hub import save
from moesaic.kernels.rounding import Bits, dequantized, round_to_ints
from moesaic.models.decoder import Decoder
from moesaic.quantize.apply import pack_weights, summary
from tests.tiny import lively, tiny_config

CONFIGS = {
    "shared expert": tiny_config(windows=(None, 5), shared=True),
    "tied": tiny_config(windows=(None,), tied=True),
    "dense": tiny_config(windows=(None, None)),
}
IDS_BS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(4))


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@torch.no_grad()
def rounded(model: Decoder, bits: Bits, experts_bits: Bits) -> Decoder:
    """A copy that computes in fp32 with the rounded weights."""
    other = copy.deepcopy(model)
    for name, module in other.named_modules():
        if isinstance(module, nn.Linear):
            own = 8 if name == "head" else bits
            module.weight.copy_(dequantized(round_to_ints(module.weight, own, 32), 32))
        if isinstance(module, GroupedExperts):
            for weight in (module.into[0], module.down):
                weight.copy_(dequantized(round_to_ints(weight, experts_bits, 32), 32))
    return other


@torch.no_grad()
@pytest.mark.parametrize(("bits", "experts_bits"), [(8, 8), (4, 4), (8, 4)])
def test_a_packed_model_computes_with_its_rounded_weights(config: ModelConfig, bits: Bits, experts_bits: Bits) -> None:
    """But for its rows, which are rounded to 8 bits at every product."""
    model = lively(config).eval()
    wanted, exact = rounded(model, bits, experts_bits)(IDS_BS), model(IDS_BS)
    told = pack_weights(model, bits, experts_bits=experts_bits)
    got = model(IDS_BS)
    assert (got - wanted).norm() < 0.05 * exact.norm()
    if bits == experts_bits == 4:
        assert (got - wanted).norm() < 0.3 * (got - exact).norm(), "rounding rows must cost less than rounding weights"
    kinds = {type(module) for module in model.modules()}
    assert PackedLinear in kinds and nn.Linear not in kinds and GroupedExperts not in kinds
    has_experts = any(not isinstance(layer.feed_forward, MlpConfig) for layer in config.layers)
    assert (PackedExperts in kinds) == has_experts
    by_name = {each.name: each for each in told}
    assert all(each.error < (0.01 if each.bits == 8 else 0.15) for each in told)
    assert by_name["head.weight"].error < 0.01


def test_it_writes_on(config: ModelConfig) -> None:
    model = lively(config).eval()
    pack_weights(model, 8)
    together = generate(model, [[1, 2, 3], [4, 5]], 6, eos_token_ids=())
    assert together == [generate(model, prompt, 6, eos_token_ids=()) for prompt in ([1, 2, 3], [4, 5])]


@torch.no_grad()
def test_a_change_of_dtype_leaves_packed_bytes_alone() -> None:
    model = lively(CONFIGS["shared expert"]).eval()
    pack_weights(model, 8)
    before = [buffer.clone() for buffer in model.buffers() if buffer.dtype == torch.uint8]
    model.to(torch.bfloat16)
    after = [buffer for buffer in model.buffers() if buffer.dtype == torch.uint8]
    assert before and all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert model(IDS_BS).dtype == torch.bfloat16


def test_it_is_neither_trained_nor_saved(tmp_path) -> None:
    model = lively(CONFIGS["dense"]).eval()
    told = pack_weights(model, 4)
    with pytest.raises(ConfigError, match="packed weights do not train; load the model without bits"):
        model(IDS_BS).sum().backward()
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.q_proj\.weight is packed"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "weights packed at" in summary(told) and "\n" not in summary(told)


def test_other_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 bits; known: 4, 8"):
        pack_weights(lively(CONFIGS["tied"]), 3)  # pyright: ignore[reportArgumentType]
