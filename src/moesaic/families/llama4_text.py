"""Llama 4 (Scout, Maverick): chunks of tokens and layers without positions, router weights on the experts' inputs.

The released files are of `model_type` llama4 and hold an image part too; its text part is what is read.
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
    TemperatureConfig,
)
from moesaic.errors import ConfigError
from moesaic.families._common import (
    HfFields,
    Preset,
    attentions,
    decoder_weight_map,
    outer_fields,
    shared_attention,
    shared_dense,
    shared_moe,
    the_same,
)
from moesaic.families._multimodal import has_text_part, text_part
from moesaic.families._rope import rope_fields
from moesaic.models.weight_map import Piece, WeightMap

NAME = "llama4_text"
ALIASES = ("llama4",)
# How the files of llama4 call the text part, and the others, which are left out.
TEXT_PREFIX = "language_model."
LEFT_OUT = ("vision_model.", "multi_modal_projector.")
_CHUNKED, _FULL = "chunked_attention", "full_attention"


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` llama4_text, or the text part of one of llama4.

    Raises ConfigError for what we cannot express.
    """
    hf = HfFields(_text_part(raw))
    norm = NormConfig(eps=hf.number("rms_norm_eps", 1e-5))
    num_layers = hf.size("num_hidden_layers")
    routed, turned, chunked = _routed(hf, num_layers), _turned(hf, num_layers), _chunked(hf, num_layers)
    layers = tuple(
        LayerConfig(
            attention=_attention(hf, norm, is_turned=layer in turned, is_chunked=layer in chunked),
            feed_forward=_moe(hf) if layer in routed else _mlp(hf),
            norm=norm,
        )
        for layer in range(num_layers)
    )
    return hf.model(decoder=StackConfig(layers=layers, final_norm=norm))


def _text_part(raw: dict[str, Any]) -> dict[str, Any]:
    if raw["model_type"] == NAME:
        return raw
    if not has_text_part(raw):
        text = raw.get("text_config")
        raise ConfigError(f"text_config={text!r} in a configuration of model_type llama4; it must be a table")
    return text_part(raw) | {"model_type": NAME}


def _attention(hf: HfFields, norm: NormConfig, *, is_turned: bool, is_chunked: bool) -> AttentionConfig:
    bias = hf.flag("attention_bias")  # q, k, v and o alike
    tuned = hf.get("attn_temperature_tuning", default=True)  # the first files said 4 for true
    if not isinstance(tuned, int):
        raise ConfigError(f"attn_temperature_tuning={tuned!r}; it must be true or false")
    temperature = TemperatureConfig(interval=hf.size("floor_scale", default=8192), scale=hf.number("attn_scale", 0.1))
    return AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", default=8),
        head_dim=hf.size("head_dim", default=128),
        rope=hf.rope(default_theta=500_000.0, layout="interleaved") if is_turned else None,
        chunk=hf.size("attention_chunk_size", default=8192) if is_chunked else None,
        qkv_bias=bias,
        output_bias=bias,
        rotated_norm=norm if is_turned and hf.flag("use_qk_norm", True) else None,
        temperature=temperature if tuned and not is_turned else None,
    )


def _moe(hf: HfFields) -> MoeConfig:
    router = RouterConfig(
        name="sigmoid_input",
        num_experts=hf.size("num_local_experts", "num_experts", default=16),
        top_k=hf.size("num_experts_per_tok", default=1),
    )
    width, activation = hf.size("intermediate_size", default=8192), hf.activation()
    return MoeConfig(
        router=router,
        intermediate_size=width,
        activation=activation,
        shared=MlpConfig(intermediate_size=width, activation=activation),
    )


def _mlp(hf: HfFields) -> MlpConfig:
    return MlpConfig(intermediate_size=hf.size("intermediate_size_mlp", default=16384), activation=hf.activation())


def _routed(hf: HfFields, num_layers: int) -> set[int]:
    """The layers that `moe_layers` lists, else every `interleave_moe_layer_step`-th."""
    step = hf.size("interleave_moe_layer_step", default=1)
    listed = hf.get("moe_layers", default=list(range(step - 1, num_layers, step)))
    if not isinstance(listed, list) or any(layer not in range(num_layers) for layer in listed):
        raise ConfigError(f"moe_layers={listed!r}; it must be a list of layers from 0 to {num_layers - 1}")
    return set(listed)


def _turned(hf: HfFields, num_layers: int) -> set[int]:
    """The layers with rotary positions: those that have a 1 in `no_rope_layers`, else all but every fourth."""
    interval = hf.size("no_rope_layer_interval", default=4)
    usual = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    flags = hf.get("no_rope_layers") or usual
    if not isinstance(flags, list) or len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        raise ConfigError(f"no_rope_layers={flags!r}; give 1 (rotary positions) or 0 for each of {num_layers} layers")
    return {layer for layer in range(num_layers) if flags[layer]}


def _chunked(hf: HfFields, num_layers: int) -> set[int]:
    """The layers that look at a chunk: those that `layer_types` names so, else those with rotary positions."""
    turned = _turned(hf, num_layers)
    usual = [_CHUNKED if layer in turned else _FULL for layer in range(num_layers)]
    kinds = hf.get("layer_types", default=usual)
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in (_CHUNKED, _FULL) for kind in kinds):
        raise ConfigError(f"layer_types={kinds!r}; give {_CHUNKED} or {_FULL} for each of {num_layers} layers")
    return {layer for layer, kind in enumerate(kinds) if kind == _CHUNKED}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json, of `model_type` llama4_text. Raises ConfigError for layers that differ in other ways."""
    attention = shared_attention(config, "rope", "chunk", "rotated_norm", "temperature")
    each, moe, dense = attentions(config), shared_moe(config), shared_dense(config)
    ropes = [layer.rope for layer in each if layer.rope is not None]
    chunks = [layer.chunk for layer in each if layer.chunk is not None]
    temperatures = [layer.temperature for layer in each if layer.temperature is not None]
    temperature = the_same("the temperature", NAME, temperatures) if temperatures else TemperatureConfig()
    described = outer_fields(config, "Llama4ForCausalLM") | {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": moe.intermediate_size,
        # Without a dense layer nothing reads its width, but transformers wants one: as wide as the active experts.
        "intermediate_size_mlp": dense.intermediate_size if dense else (1 + moe.router.top_k) * moe.intermediate_size,
        "num_local_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "moe_layers": list(config.moe_layers),
        "interleave_moe_layer_step": 1,
        "no_rope_layers": [int(layer.rope is not None) for layer in each],
        "use_qk_norm": any(layer.rotated_norm for layer in each),
        "attention_bias": attention.qkv_bias,
        "attention_chunk_size": the_same("the chunk", NAME, chunks) if chunks else 8192,
        "layer_types": [_FULL if layer.chunk is None else _CHUNKED for layer in each],
        "attn_temperature_tuning": bool(temperatures),
        "floor_scale": temperature.interval,
        "attn_scale": temperature.scale,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }
    return described | (rope_fields(the_same("rope", NAME, ropes), attention.head_dim) if ropes else {})


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors in Llama 4's files, those of its text part: experts stacked and transposed, gate beside up."""
    parts, shared = ("gate_proj", "up_proj", "down_proj"), "feed_forward.shared_expert"
    own = {
        "feed_forward.router.weight": (Piece("feed_forward.router.weight"),),
        "feed_forward.experts.gate_up": (Piece("feed_forward.experts.gate_up_proj", transposed=True),),
        "feed_forward.experts.down": (Piece("feed_forward.experts.down_proj", transposed=True),),
    }
    for part in parts:
        own[f"feed_forward.{part}.weight"] = (Piece(f"feed_forward.{part}.weight"),)
        own[f"feed_forward.shared_experts.{part}.weight"] = (Piece(f"{shared}.{part}.weight"),)
    return decoder_weight_map(config, own=own)


def _preset(name: str, **fields: Any) -> Preset:
    common = {
        "model_type": NAME,
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
    }
    return Preset(common | fields, licence="Llama 4 Community License", source=f"meta-llama/{name}; its text part")


PRESETS = {
    "llama-4-scout": _preset(
        "Llama-4-Scout-17B-16E-Instruct",
        num_local_experts=16,
        max_position_embeddings=10485760,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "llama-4-maverick": _preset(
        "Llama-4-Maverick-17B-128E-Instruct",
        num_local_experts=128,
        interleave_moe_layer_step=2,
        max_position_embeddings=1048576,
        use_qk_norm=False,
    ),
}
