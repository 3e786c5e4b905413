"""Mistral (arXiv:2310.06825): a Llama whose layers may all look at a window of tokens. The dense twin of a Mixtral."""

from typing import Any

from moesaic.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig, NormConfig, StackConfig
from moesaic.families._common import HfFields, Preset, decoder_weight_map, hf_fields, shared_attention, shared_mlp
from moesaic.models.weight_map import WeightMap

NAME = "mistral"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` mistral. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-6))
    attention = AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", default=8),
        head_dim=hf.head_dim(),
        rope=hf.rope(default_theta=10_000.0),
        window=_window(hf),
    )
    mlp = MlpConfig(intermediate_size=hf.size("intermediate_size"), activation=hf.activation())
    layer = LayerConfig(attention=attention, feed_forward=mlp, norm=norm)
    return hf.model(decoder=StackConfig(layers=(layer,) * hf.size("num_hidden_layers"), final_norm=norm))


def _window(hf: HfFields) -> int | None:
    """Its window is 4096 tokens unless the configuration says otherwise; null says that there is none."""
    return hf.window() if "sliding_window" in hf.raw else 4096


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    return hf_fields(config, "MistralForCausalLM") | {
        "intermediate_size": shared_mlp(config).intermediate_size,
        "sliding_window": shared_attention(config).window,
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in Mistral's files."""
    return decoder_weight_map(config)


_COMMON = {
    "model_type": NAME,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

PRESETS = {
    "mistral-7b": Preset(
        _COMMON
        | {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "rope_theta": 1e4,
            "sliding_window": 4096,
        },
        licence="Apache-2.0",
        source="mistralai/Mistral-7B-v0.1; arXiv:2310.06825",
    ),
    "mistral-nemo-12b": Preset(
        _COMMON
        | {
            "vocab_size": 131072,
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "num_hidden_layers": 40,
            "max_position_embeddings": 128000,
            "rope_theta": 1e6,
            "sliding_window": None,
        },
        licence="Apache-2.0",
        source="mistralai/Mistral-Nemo-Base-2407",
    ),
    "mistral-small-24b": Preset(
        _COMMON
        | {
            "vocab_size": 131072,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "rope_theta": 1e8,
            "sliding_window": None,
        },
        licence="Apache-2.0",
        source="mistralai/Mistral-Small-24B-Base-2501",
    ),
}
