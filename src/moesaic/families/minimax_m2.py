"""MiniMax-M2, M2.5 and M2.7: heads turn in part, queries and keys are normalised whole, a sigmoid chooses experts.

The released configurations tell of modules that predict further tokens. The released files do not hold them, so they
are left out here.
"""

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
    ExpertNames,
    HfFields,
    Preset,
    decoder_weight_map,
    hf_fields,
    refusal,
    shared_attention,
    shared_moe,
)
from moesaic.models.weight_map import Piece, WeightMap

NAME = "minimax_m2"
# What the released configurations say of parts that transformers builds in one way only.
_KNOWN = {
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "shared_intermediate_size": 0,
}


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` minimax_m2. Raises ConfigError for what we cannot express."""
    hf = HfFields(raw)
    for name, known in _KNOWN.items():
        if hf.get(name, default=known) != known:
            raise ConfigError(f"{name}={raw[name]!r} is not supported; known: {known!r}")
    if set(hf.get("attn_type_list", default=[1])) != {1}:
        raise ConfigError(
            f"attn_type_list={raw['attn_type_list']!r} is not supported; known: 1 (softmax) in all layers"
        )
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-6))
    layer = LayerConfig(attention=_attention(hf, norm), feed_forward=_moe(hf), norm=norm)
    return hf.model(decoder=StackConfig(layers=(layer,) * hf.size("num_hidden_layers"), final_norm=norm))


def _attention(hf: HfFields, norm: NormConfig) -> AttentionConfig:
    head_dim = hf.size("head_dim", default=128)
    partial = hf.size("rotary_dim") / head_dim if hf.get("rotary_dim") is not None else 1.0
    return AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", default=8),
        head_dim=head_dim,
        rope=hf.rope(default_theta=5e6, partial=partial),
        projection_norm=norm,
    )


def _moe(hf: HfFields) -> MoeConfig:
    router = RouterConfig(
        name="sigmoid_topk",
        num_experts=hf.size("num_local_experts", "num_experts", default=256),
        top_k=hf.size("num_experts_per_tok", default=8),
        selection_bias=True,
    )
    return MoeConfig(router=router, intermediate_size=hf.size("intermediate_size"), activation=hf.activation())


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    attention, moe = shared_attention(config), shared_moe(config)
    if len(config.moe_layers) != len(config.layers):
        raise refusal(NAME, "some of its layers are dense")
    rotary_dim = attention.rope.rotary_dim if attention.rope else None
    own = {
        "rotary_dim": rotary_dim or attention.head_dim,
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }
    return hf_fields(config, "MiniMaxM2ForCausalLM") | own | _KNOWN


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in MiniMax-M2's files, which are Mixtral's: w1 is the gate, w3 up, w2 down."""
    inside = "block_sparse_moe.experts.{e}"
    names = ExpertNames("block_sparse_moe.gate", gate=f"{inside}.w1", up=f"{inside}.w3", down=f"{inside}.w2")
    bias = {"feed_forward.router.selection_bias": (Piece("block_sparse_moe.e_score_correction_bias"),)}
    return decoder_weight_map(config, names, bias)


def _preset(name: str, context_length: int, licence: str) -> Preset:
    fields = {
        "model_type": NAME,
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "max_position_embeddings": context_length,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "rotary_dim": 64,
        "bos_token_id": 200034,
        "eos_token_id": 200020,
    }
    return Preset(fields, licence=licence, source=f"MiniMaxAI/MiniMax-{name}")


PRESETS = {
    "minimax-m2": _preset("M2", 196608, "MIT, later modified: see the repository"),
    "minimax-m2.5": _preset("M2.5", 196608, "Modified MIT: MiniMax Model License"),
    "minimax-m2.7": _preset("M2.7", 204800, "MiniMax Non-Commercial License"),
}
