"""Both kinds of norms against torch's own, and what does not go together."""

import pytest
import torch

from moesaic.config import AttentionConfig, ModelConfig, NormConfig
from moesaic.errors import ConfigError
from moesaic.layers.norm import norm
from tests.tiny import tiny_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [NormConfig(eps=1e-3), NormConfig(eps=1e-3, kind="layer"), NormConfig(eps=1e-3, kind="layer", bias=True)],
    ids=["rms", "layer", "layer with bias"],
)
def test_a_norm_is_torchs(config: NormConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    ours = norm(config, 11).to(dtype)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    x = (torch.randn(3, 5, 11) + 2).to(dtype)
    assert {name for name, _ in ours.named_parameters()} == ({"weight", "bias"} if config.bias else {"weight"})
    if config.kind == "layer":
        theirs = torch.nn.LayerNorm(11, eps=1e-3, bias=config.bias).to(dtype)
    else:
        theirs = torch.nn.RMSNorm(11, eps=1e-3).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(ours(x), theirs(x), atol=1e-6 if dtype == torch.float32 else 4e-2)


def test_what_does_not_go_together_is_one_line() -> None:
    with pytest.raises(ConfigError, match='norm kind="rms", which has none; use kind="layer"'):
        NormConfig(bias=True)
    with pytest.raises(ConfigError, match="norm kind='batch'; known: rms, layer"):
        NormConfig(kind="batch")  # pyright: ignore[reportArgumentType]
    one = NormConfig()
    with pytest.raises(ConfigError, match="one norm before the rotation"):
        AttentionConfig(num_heads=2, num_key_value_heads=1, head_dim=4, head_norm=one, projection_norm=one)
    with pytest.raises(ConfigError, match=r"clip=0\.0 in AttentionConfig; it must be above 0"):
        AttentionConfig(num_heads=2, num_key_value_heads=1, head_dim=4, clip=0.0)
    with pytest.raises(ConfigError, match="head_bias with tie_word_embeddings or logits_divisor"):
        ModelConfig(
            family="phimoe",
            vocab_size=7,
            hidden_size=4,
            context_length=8,
            decoder=tiny_config().decoder,
            tie_word_embeddings=True,
            head_bias=True,
        )
