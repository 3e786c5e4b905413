"""ERNIE 4.5 (Baidu's technical report of 2025): softmax experts that a bias helps to choose, shared and dense blocks.

The layers that predict further tokens (`num_nextn_predict_layers`, tensors `model.mtp_*`) are left out, as transformers
leaves them out.
"""

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
from moesaic.errors import ConfigError
from moesaic.families._common import (
    HfFields,
    Preset,
    decoder_weight_map,
    hf_fields,
    refusal,
    shared_attention,
    shared_dense,
    shared_moe,
)
from moesaic.families._qwen import EXPERTS
from moesaic.models.weight_map import Piece, WeightMap

NAME = "ernie4_5_moe"
LEFT_OUT = ("model.mtp_",)


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` ernie4_5_moe. Raises ConfigError for what we cannot express."""
    hf = HfFields({"tie_word_embeddings": True} | raw)
    # The chosen probabilities are divided by their sum, which this bounds from below: it never is that small.
    if not 0 <= hf.number("moe_norm_min", 1e-12) <= 1e-6:
        raise ConfigError(f"moe_norm_min={raw['moe_norm_min']!r} is not supported; known: up to 1e-6")
    norm, bias = NormConfig(eps=hf.number("rms_norm_eps", 1e-5)), hf.flag("use_bias")
    moe, mlp = _moe(hf, bias), _mlp(hf, hf.size("intermediate_size"), bias)
    attention = AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", "num_attention_heads"),
        head_dim=hf.head_dim(),
        rope=hf.rope(default_theta=500_000.0, layout="interleaved"),
        qkv_bias=bias,
        output_bias=bias,
    )
    layers = tuple(
        LayerConfig(attention=attention, feed_forward=moe if routes else mlp, norm=norm) for routes in _which_route(hf)
    )
    return hf.model(decoder=StackConfig(layers=layers, final_norm=norm), head_bias=bias)


def _which_route(hf: HfFields) -> list[bool]:
    """Layer i is an MoE if it is neither before the first nor after the last, and the interval divides i + 1."""
    num_layers, interval = hf.size("num_hidden_layers"), hf.size("moe_layer_interval", default=1)
    first, last = _layer(hf, "moe_layer_start_index", 1), _layer(hf, "moe_layer_end_index", -1)
    last = num_layers - 1 if last == -1 else last
    return [first <= layer <= last and (layer + 1) % interval == 0 for layer in range(num_layers)]


def _layer(hf: HfFields, name: str, default: int) -> int:
    layer = hf.get(name, default=default)
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ConfigError(f"{name}={layer!r}; it must be the index of a layer")
    return layer


def _mlp(hf: HfFields, width: int, bias: bool) -> MlpConfig:
    return MlpConfig(intermediate_size=width, activation=hf.activation(), bias=bias)


def _moe(hf: HfFields, bias: bool) -> MoeConfig:
    width = hf.size("moe_intermediate_size", default=1536)
    num_shared = hf.get("moe_num_shared_experts", default=2)
    router = RouterConfig(
        name="softmax_topk",
        num_experts=hf.size("moe_num_experts", "num_experts", default=64),
        top_k=hf.size("moe_k", "num_experts_per_tok", default=6),
        selection_bias=True,
        fp32_weight=True,
    )
    return MoeConfig(
        router=router,
        intermediate_size=width,
        activation=hf.activation(),
        shared=_mlp(hf, width * hf.size("moe_num_shared_experts", default=2), bias) if num_shared else None,
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    moe, dense, routed = shared_moe(config), shared_dense(config), config.moe_layers
    shared_width = moe.shared.intermediate_size if moe.shared else 0
    if shared_width % moe.intermediate_size:
        raise refusal(NAME, f"its shared expert is {shared_width} wide, no multiple of {moe.intermediate_size}")
    # Without a dense layer nothing reads its width, but transformers wants one: as wide as the active experts.
    width = dense.intermediate_size if dense else moe.router.top_k * moe.intermediate_size
    return hf_fields(config, "Ernie4_5_MoeForCausalLM") | {
        "intermediate_size": width,
        "use_bias": shared_attention(config).qkv_bias,
        "moe_intermediate_size": moe.intermediate_size,
        "moe_num_experts": moe.router.num_experts,
        "moe_k": moe.router.top_k,
        "moe_num_shared_experts": shared_width // moe.intermediate_size,
        "moe_layer_start_index": routed[0],
        "moe_layer_end_index": routed[-1],
        "moe_layer_interval": routed[1] - routed[0] if len(routed) > 1 else 1,
        "moe_norm_min": 1e-12,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in ERNIE's files, in which the selection bias is a matrix of one row."""
    bias = Piece("mlp.moe_statics.e_score_correction_bias", file_index=(0,))
    shared = {
        f"feed_forward.shared_experts.{part}.{kind}": (Piece(f"mlp.shared_experts.{part}.{kind}"),)
        for part in ("gate_proj", "up_proj", "down_proj")
        for kind in ("weight", "bias")
    }
    return decoder_weight_map(config, EXPERTS, {"feed_forward.router.selection_bias": (bias,)} | shared)


_COMMON = {
    "model_type": NAME,
    "vocab_size": 103424,
    "moe_num_experts": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

PRESETS = {
    "ernie-4.5-21b-a3b": Preset(
        _COMMON
        | {
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "num_hidden_layers": 28,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "moe_k": 6,
            "moe_intermediate_size": 1536,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "tie_word_embeddings": True,
        },
        licence="Apache-2.0",
        source="baidu/ERNIE-4.5-21B-A3B-PT",
    ),
    "ernie-4.5-300b-a47b": Preset(
        _COMMON
        | {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 54,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "moe_k": 8,
            "moe_intermediate_size": 3584,
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 3,
            "tie_word_embeddings": False,
        },
        licence="Apache-2.0",
        source="baidu/ERNIE-4.5-300B-A47B-PT",
    ),
}
