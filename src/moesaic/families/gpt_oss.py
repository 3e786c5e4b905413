"""gpt-oss (arXiv:2508.10925): biases everywhere, sinks in every head, windows in every other layer, clamped SwiGLU."""

from typing import Any

from moesaic.config import (
    AttentionConfig,
    ClampedSwiglu,
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
    attentions,
    decoder_weight_map,
    hf_fields,
    refusal,
    shared_attention,
    shared_moe,
    the_same,
)
from moesaic.models.weight_map import Piece, WeightMap

NAME = "gpt_oss"
_WINDOWED, _FULL = "sliding_attention", "full_attention"
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` gpt_oss. Raises ConfigError for what we cannot express."""
    if raw.get("rope_parameters") is None and raw.get("rope_scaling") is None:
        raw = raw | {"rope_scaling": _YARN}
    hf = HfFields(raw)
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-5))
    moe = _moe(hf)
    layers = tuple(
        LayerConfig(attention=_attention(hf, window), feed_forward=moe, norm=norm) for window in _windows(hf)
    )
    return hf.model(decoder=StackConfig(layers=layers, final_norm=norm))


def _attention(hf: HfFields, window: int | None) -> AttentionConfig:
    bias = hf.flag("attention_bias", True)  # q, k, v and o alike
    return AttentionConfig(
        num_heads=hf.size("num_attention_heads", default=64),
        num_key_value_heads=hf.size("num_key_value_heads", default=8),
        head_dim=hf.size("head_dim", default=64),
        rope=hf.rope(default_theta=150_000.0),
        window=window,
        qkv_bias=bias,
        output_bias=bias,
        sinks=True,
    )


def _windows(hf: HfFields) -> list[int | None]:
    """The window of every layer, None where it sees all: the first layer, the third and so on unless told."""
    num_layers = hf.size("num_hidden_layers")
    window = hf.size("sliding_window", default=128)
    kinds = hf.get("layer_types", default=[_FULL if layer % 2 else _WINDOWED for layer in range(num_layers)])
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in (_WINDOWED, _FULL) for kind in kinds):
        raise ConfigError(f"layer_types={kinds!r}; give {_FULL} or {_WINDOWED} for each of {num_layers} layers")
    return [window if kind == _WINDOWED else None for kind in kinds]


def _moe(hf: HfFields) -> MoeConfig:
    hf.activation()  # the files say silu; what they mean is this
    activation = ClampedSwiglu(limit=hf.number("swiglu_limit", 7.0), alpha=hf.number("swiglu_alpha", 1.702), shift=1.0)
    router = RouterConfig(
        name="topk_softmax",
        num_experts=hf.size("num_local_experts", "num_experts", default=128),
        top_k=hf.size("num_experts_per_tok", "experts_per_token", default=4),
        bias=True,
    )
    return MoeConfig(router=router, intermediate_size=hf.size("intermediate_size"), activation=activation, bias=True)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    attention, moe = shared_attention(config, "window"), shared_moe(config)
    if len(config.moe_layers) != len(config.layers):
        raise refusal(NAME, "some of its layers are dense")
    if not isinstance(moe.activation, ClampedSwiglu):
        raise refusal(NAME, f"its experts' activation is {moe.activation!r} and not a clamped SwiGLU")
    windows = [attention.window for attention in attentions(config)]
    sizes = [window for window in windows if window is not None]
    return hf_fields(config, "GptOssForCausalLM", "window") | {
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "attention_bias": attention.qkv_bias,
        "sliding_window": the_same("the window", NAME, sizes) if sizes else 128,
        "layer_types": [_FULL if window is None else _WINDOWED for window in windows],
        "swiglu_limit": moe.activation.limit,
        "swiglu_alpha": moe.activation.alpha,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.9,
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors in gpt-oss's files: experts stacked and transposed, gate and up in turn."""
    inner = shared_moe(config).intermediate_size
    gate, up = slice(0, inner), slice(inner, 2 * inner)
    whole, even, odd = slice(None), slice(0, None, 2), slice(1, None, 2)
    experts = "mlp.experts"
    own = {
        "attention.sinks": (Piece("self_attn.sinks"),),
        "feed_forward.router.weight": (Piece("mlp.router.weight"),),
        "feed_forward.router.bias": (Piece("mlp.router.bias"),),
        "feed_forward.experts.gate_up": (
            Piece(f"{experts}.gate_up_proj", (whole, gate), (whole, whole, even), transposed=True),
            Piece(f"{experts}.gate_up_proj", (whole, up), (whole, whole, odd), transposed=True),
        ),
        "feed_forward.experts.gate_up_bias": (
            Piece(f"{experts}.gate_up_proj_bias", (whole, gate), (whole, even)),
            Piece(f"{experts}.gate_up_proj_bias", (whole, up), (whole, odd)),
        ),
        "feed_forward.experts.down": (Piece(f"{experts}.down_proj", transposed=True),),
        "feed_forward.experts.down_bias": (Piece(f"{experts}.down_proj_bias"),),
    }
    return decoder_weight_map(config, own=own)


def _preset(size: str, num_layers: int, num_experts: int) -> Preset:
    fields = {
        "model_type": NAME,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": num_experts,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_scaling": _YARN,
        "eos_token_id": 200002,
        "pad_token_id": 199999,
    }
    return Preset(fields, licence="Apache-2.0", source=f"openai/gpt-oss-{size}; arXiv:2508.10925")


PRESETS = {"gpt-oss-20b": _preset("20b", 24, 32), "gpt-oss-120b": _preset("120b", 36, 128)}
