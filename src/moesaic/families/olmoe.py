"""OLMoE (arXiv:2409.02060): queries and keys normalised whole, every layer an MoE, weights not renormalised."""

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
from moesaic.errors import ConfigError
from moesaic.families._common import (
    HfFields,
    Preset,
    decoder_weight_map,
    hf_fields,
    refusal,
    shared_attention,
    shared_moe,
)
from moesaic.families._qwen import EXPERTS
from moesaic.models.weight_map import WeightMap

NAME = "olmoe"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` olmoe. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-5))
    layer = LayerConfig(attention=_attention(hf, norm), feed_forward=_moe(hf), norm=norm)
    return hf.model(decoder=StackConfig(layers=(layer,) * hf.size("num_hidden_layers"), final_norm=norm))


def _attention(hf: HfFields, norm: NormConfig) -> AttentionConfig:
    num_heads, head_dim, hidden_size = hf.size("num_attention_heads"), hf.head_dim(), hf.size("hidden_size")
    if num_heads * head_dim != hidden_size:
        raise ConfigError(f"head_dim={head_dim} of {num_heads} heads; {NAME} needs hidden_size={hidden_size} in all")
    bias = hf.flag("attention_bias")  # q, k, v and o alike
    return AttentionConfig(
        num_heads=num_heads,
        num_key_value_heads=hf.size("num_key_value_heads", "num_attention_heads"),
        head_dim=head_dim,
        rope=hf.rope(default_theta=10_000.0),
        qkv_bias=bias,
        output_bias=bias,
        projection_norm=norm,
        clip=None if hf.get("clip_qkv") is None else hf.number("clip_qkv", 0.0),
    )


def _moe(hf: HfFields) -> MoeConfig:
    router = RouterConfig(
        name="softmax_topk",
        num_experts=hf.size("num_experts", "num_local_experts", default=64),
        top_k=hf.size("num_experts_per_tok", default=8),
        renormalize=hf.flag("norm_topk_prob"),
    )
    return MoeConfig(router=router, intermediate_size=hf.size("intermediate_size"), activation=hf.activation())


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    attention, moe = shared_attention(config), shared_moe(config)
    if len(config.moe_layers) != len(config.layers):
        raise refusal(NAME, "some of its layers are dense")
    if attention.num_heads * attention.head_dim != config.hidden_size:
        raise refusal(NAME, f"its heads are not hidden_size={config.hidden_size} wide in all")
    return hf_fields(config, "OlmoeForCausalLM") | {
        "intermediate_size": moe.intermediate_size,
        "num_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "norm_topk_prob": moe.router.renormalize,
        "attention_bias": attention.qkv_bias,
        "clip_qkv": attention.clip,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.01,
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in OLMoE's files."""
    return decoder_weight_map(config, EXPERTS)


PRESETS = {
    "olmoe-1b-7b": Preset(
        {
            "model_type": NAME,
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "eos_token_id": 50279,
            "pad_token_id": 1,
        },
        licence="Apache-2.0",
        source="allenai/OLMoE-1B-7B-0924; arXiv:2409.02060",
    ),
}
