"""Mixtral (arXiv:2401.04088): every layer an MoE, softmax over all experts, the chosen weights renormalised."""

from typing import Any

from moesaic.config import (
    AttentionConfig,
    LayerConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    RouterConfig,
    StackConfig,
)
from moesaic.families._common import (
    ExpertNames,
    HfFields,
    Preset,
    decoder_weight_map,
    hf_fields,
    refusal,
    shared_attention,
    shared_moe,
)
from moesaic.models.weight_map import WeightMap

NAME = "mixtral"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` mixtral. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-5))
    attention = AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", default=8),
        head_dim=hf.head_dim(),
        rope=hf.rope(default_theta=1e6),
        window=hf.window(),
    )
    router = RouterConfig(
        name="softmax_topk",
        num_experts=hf.size("num_local_experts", "num_experts", default=8),
        top_k=hf.size("num_experts_per_tok", default=2),
    )
    moe = MoeConfig(router=router, intermediate_size=hf.size("intermediate_size"), activation=hf.activation())
    layer = LayerConfig(attention=attention, feed_forward=moe, norm=norm)
    return hf.model(decoder=StackConfig(layers=(layer,) * hf.size("num_hidden_layers"), final_norm=norm))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    attention, moe = shared_attention(config), shared_moe(config)
    if len(config.moe_layers) != len(config.layers):
        raise refusal(NAME, "some of its layers are dense")
    return hf_fields(config, "MixtralForCausalLM") | {
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "sliding_window": attention.window,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in Mixtral's files: w1 is the gate, w3 up, w2 down."""
    inside = "block_sparse_moe.experts.{e}"
    names = ExpertNames("block_sparse_moe.gate", gate=f"{inside}.w1", up=f"{inside}.w3", down=f"{inside}.w2")
    return decoder_weight_map(config, names)


_COMMON = {
    "model_type": NAME,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

PRESETS = {
    "mixtral-8x7b": Preset(
        _COMMON
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 32768,
        },
        licence="Apache-2.0",
        source="mistralai/Mixtral-8x7B-v0.1; arXiv:2401.04088",
    ),
    "mixtral-8x22b": Preset(
        _COMMON
        | {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_hidden_layers": 56,
            "num_attention_heads": 48,
            "max_position_embeddings": 65536,
        },
        licence="Apache-2.0",
        source="mistralai/Mixtral-8x22B-v0.1",
    ),
    "smollm2-moe": Preset(
        {
            "model_type": NAME,
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 384,
            "num_local_experts": 8,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100_000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
        licence="Apache-2.0",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, upcycled at first use: two copies cut into four shards",
    ),
}
