"""What the Granite MoE families share (arXiv:2408.13359): multipliers all over, experts stacked in one tensor."""

from typing import Any

from moesaic.config import (
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    RouterConfig,
    StackConfig,
)
from moesaic.families._common import (
    HfFields,
    decoder_weight_map,
    hf_fields,
    refusal,
    shared_attention,
    shared_moe,
    the_same,
)
from moesaic.models.weight_map import Piece, WeightMap


def read(raw: dict[str, Any], shared: MlpConfig | None = None) -> ModelConfig:
    """A config.json. shared: the expert that every token passes, where the family has one."""
    hf = HfFields(raw)
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-6))
    router = RouterConfig(
        name="topk_softmax",
        num_experts=hf.size("num_local_experts", "num_experts", default=8),
        top_k=hf.size("num_experts_per_tok", default=2),
    )
    layer = LayerConfig(
        attention=_attention(hf),
        feed_forward=MoeConfig(
            router=router, intermediate_size=hf.size("intermediate_size"), activation=hf.activation(), shared=shared
        ),
        norm=norm,
        residual_multiplier=hf.number("residual_multiplier", 1.0),
    )
    return hf.model(
        decoder=StackConfig(layers=(layer,) * hf.size("num_hidden_layers"), final_norm=norm),
        embedding_multiplier=hf.number("embedding_multiplier", 1.0),
        logits_divisor=hf.number("logits_scaling", 1.0),
    )


def _attention(hf: HfFields) -> AttentionConfig:
    bias = hf.flag("attention_bias")  # q, k, v and o alike
    return AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", "num_attention_heads"),
        head_dim=hf.head_dim(),
        rope=hf.rope(default_theta=10_000.0),
        qkv_bias=bias,
        output_bias=bias,
        scale=hf.number("attention_multiplier", 1.0),
    )


def write(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """Its config.json, but for a shared expert. Raises ConfigError for layers that differ where it has one field."""
    attention, moe = shared_attention(config), shared_moe(config)
    if len(config.moe_layers) != len(config.layers):
        raise refusal(config.family, "some of its layers are dense")
    residual = the_same("residual_multiplier", config.family, (layer.residual_multiplier for layer in config.layers))
    return hf_fields(config, architecture) | {
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "attention_bias": attention.qkv_bias,
        "attention_multiplier": attention.head_dim**-0.5 if attention.scale is None else attention.scale,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": residual,
        "logits_scaling": config.logits_divisor,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors in Granite's files: all experts in one tensor, gate above up; so are those of the shared expert."""
    own = {
        "feed_forward.router.weight": (Piece("block_sparse_moe.router.layer.weight"),),
        "feed_forward.experts.gate_up": (Piece("block_sparse_moe.input_linear.weight"),),
        "feed_forward.experts.down": (Piece("block_sparse_moe.output_linear.weight"),),
    }
    if shared := shared_moe(config).shared:
        inner, above = shared.intermediate_size, "shared_mlp.input_linear.weight"
        own |= {
            "feed_forward.shared_experts.gate_proj.weight": (Piece(above, file_index=(slice(0, inner),)),),
            "feed_forward.shared_experts.up_proj.weight": (Piece(above, file_index=(slice(inner, 2 * inner),)),),
            "feed_forward.shared_experts.down_proj.weight": (Piece("shared_mlp.output_linear.weight"),),
        }
    return decoder_weight_map(config, own=own)
