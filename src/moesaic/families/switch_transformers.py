"""Switch Transformers (arXiv:2101.03961): T5 with experts, one for a token, and a limit to each expert's rows.

`expert_capacity` is transformers': so many tokens of a sequence, in their order, in training and in evaluation; those
beyond it get nothing from the layer. (The authors' is a share of the batch, see CapacityConfig.) Padding takes up no
slots here; in transformers padding on the left does, so that there its amount changes what is dropped.

Files of Switch-XXL hold gated blocks ("gated-gelu"), which transformers' model of this family lacks; their names here
are those of T5 v1.1. `dropout_rate` becomes that of the experts' inner activations, the only place where we drop out.
"""

import math
from collections.abc import Iterator
from typing import Any

from moesaic.config import (
    AttentionConfig,
    CapacityConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    RelativeBiasConfig,
    RouterConfig,
    StackConfig,
)
from moesaic.errors import ConfigError
from moesaic.families import _encoder_decoder as shared
from moesaic.families._common import HfFields, Preset, refusal
from moesaic.models.weight_map import WeightMap

NAME = "switch_transformers"
_GATED = {"gated-gelu": "gelu_new"}
_PLAIN = ("relu", "gelu", "gelu_new", "silu")
# What transformers takes for granted.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "expert_capacity": 64,
    "num_layers": 12,
    "num_sparse_encoder_layers": 3,
    "num_sparse_decoder_layers": 3,
    "num_heads": 12,
    "num_experts": 8,
    "router_jitter_noise": 0.01,
    "dense_act_fn": "relu",
    "n_positions": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": True,
}


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` switch_transformers. Raises ConfigError for what we cannot express."""
    hf = HfFields(_DEFAULTS | {name: value for name, value in raw.items() if value is not None})
    if (dtype := hf.get("router_dtype", default="float32")) != "float32":
        raise ConfigError(f"router_dtype={dtype!r} is not supported; known: float32")
    norm = NormConfig(eps=hf.number("layer_norm_epsilon", 1e-6))
    size = hf.size("d_model")
    renamed = {"hidden_size": size, "max_position_embeddings": hf.size("n_positions")}
    return HfFields(hf.raw | renamed).model(
        encoder=StackConfig(layers=tuple(_layers(hf, "encoder", norm)), final_norm=norm),
        decoder=StackConfig(layers=tuple(_layers(hf, "decoder", norm)), final_norm=norm),
        # A tied head's logits are scaled by d^-0.5, so that its table may be as large as embeddings are.
        logits_divisor=math.sqrt(size) if hf.flag("tie_word_embeddings") else 1.0,
        decoder_start_token_id=hf.token_id("decoder_start_token_id"),
    )


def _layers(hf: HfFields, stack: str, norm: NormConfig) -> Iterator[LayerConfig]:
    count, step = _num_layers(hf, stack), _step(hf, stack)
    buckets = RelativeBiasConfig(
        num_buckets=hf.size("relative_attention_num_buckets", default=32),
        max_distance=hf.size("relative_attention_max_distance", default=128),
    )
    for index in range(count):
        yield LayerConfig(
            attention=_attention(hf, buckets if index == 0 else 0),
            cross_attention=_attention(hf, None) if stack == "decoder" else None,
            feed_forward=_moe(hf) if is_sparse(index, step) else _mlp(hf),
            norm=norm,
        )


def _num_layers(hf: HfFields, stack: str) -> int:
    return hf.size("num_layers") if stack == "encoder" else hf.size("num_decoder_layers", "num_layers")


def _step(hf: HfFields, stack: str) -> int:
    """Every how many layers one is sparse: as stated, or as it follows from how many there are.

    Where none is to be, transformers takes the number of layers, and so makes the second one sparse.
    """
    step = hf.get(f"{stack}_sparse_step")
    if step is None:
        count, sparse = _num_layers(hf, stack), hf.get(f"num_sparse_{stack}_layers", default=0)
        step = count // sparse if isinstance(sparse, int) and sparse > 0 else count
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ConfigError(f"{stack}_sparse_step={step!r}; it must be a whole number, 0 (none) or more")
    return step


def is_sparse(index: int, step: int) -> bool:
    """Whether the layer is an MoE layer: the second of every `step`, or all."""
    return step == 1 or (step > 0 and index % step == 1)


def _attention(hf: HfFields, bias: RelativeBiasConfig | int | None) -> AttentionConfig:
    heads = hf.size("num_heads")
    return AttentionConfig(
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=hf.size("d_kv"),
        rope=None,
        scale=1.0,  # of the scores themselves: T5's initial weights have the factor in them
        relative_bias=bias,
    )


def _activation(hf: HfFields) -> tuple[str, bool]:
    """Its name among ours, and whether there is a gate."""
    name: str = hf.get("dense_act_fn")
    if name in _GATED:
        return _GATED[name], True
    if name not in _PLAIN:
        raise ConfigError(f"dense_act_fn={name!r} is not supported; known: {', '.join((*_PLAIN, *_GATED))}")
    return name, False


def _mlp(hf: HfFields) -> MlpConfig:
    activation, gated = _activation(hf)
    return MlpConfig(intermediate_size=hf.size("d_ff"), activation=activation, gated=gated)


def _moe(hf: HfFields) -> MoeConfig:
    activation, gated = _activation(hf)
    capacity = CapacityConfig(fixed=hf.size("expert_capacity"), group_size="document")
    router = RouterConfig(
        name="switch",
        num_experts=hf.size("num_experts"),
        top_k=1,
        jitter=hf.number("router_jitter_noise", 0.0),
        bias=hf.flag("router_bias"),
    )
    return MoeConfig(
        router=router,
        intermediate_size=hf.size("d_ff"),
        activation=activation,
        gated=gated,
        capacity=capacity,
        evaluation_capacity=capacity,
        expert_dropout=hf.number("dropout_rate", 0.1),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    attention, encoder = config.decoder.layers[0].attention, config.encoder
    if encoder is None or not isinstance(attention, AttentionConfig):
        raise refusal(NAME, "it has no encoder" if encoder is None else "its attention keeps latents (MlaConfig)")
    layer, moe, _ = shared.alike(config, config.layers)
    bias = attention.relative_bias
    if not isinstance(bias, RelativeBiasConfig):
        raise refusal(NAME, "its first decoder layer has no relative biases")
    if moe is None or moe.capacity is None or moe.capacity.fixed is None:
        raise refusal(NAME, "it has no MoE layer" if moe is None else "its experts have no fixed capacity")
    return {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": NAME,
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": attention.head_dim,
        "d_ff": moe.intermediate_size,
        "num_heads": attention.num_heads,
        "n_positions": config.context_length,
        **_depth("encoder", "num_layers", encoder),
        **_depth("decoder", "num_decoder_layers", config.decoder),
        "num_experts": moe.num_experts,
        "expert_capacity": moe.capacity.fixed,
        "router_bias": moe.router.bias,
        "router_jitter_noise": moe.router.jitter,
        "router_dtype": "float32",
        "relative_attention_num_buckets": bias.num_buckets,
        "relative_attention_max_distance": bias.max_distance,
        "dense_act_fn": "gated-gelu" if moe.gated else moe.activation,
        "dropout_rate": moe.expert_dropout,
        "layer_norm_epsilon": layer.norm.eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": shared.one_or_all(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
        "use_cache": True,
    }


def _depth(stack: str, name: str, config: StackConfig) -> dict[str, int]:
    """Layers and sparse ones; the step is stated beside them, since it does not follow from every such pair."""
    sparse = sum(isinstance(layer.feed_forward, MoeConfig) for layer in config.layers)
    step = shared.step_of(config, is_sparse, NAME)
    return {name: len(config.layers), f"num_sparse_{stack}_layers": sparse, f"{stack}_sparse_step": step}


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in Switch's files."""
    outer = {
        "embedding": "shared",
        "encoder_final_norm": "encoder.final_layer_norm",
        "final_norm": "decoder.final_layer_norm",
        "head": "lm_head",
    }
    gated = any(".gate_" in spec.name for spec in config.tensors())
    return shared.weight_map(config, outer, _names("encoder", 1, gated), _names("decoder", 2, gated))


def _names(stack: str, feed_forward: int, gated: bool) -> shared.StackNames:
    gate, up = ("wi_0", "wi_1") if gated else ("", "wi")
    inside = f"layer.{feed_forward}"
    modules = {
        "attention_norm": "layer.0.layer_norm",
        **{f"attention.{part}_proj": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
        "attention.relative_bias": "layer.0.SelfAttention.relative_attention_bias",
        "cross_attention_norm": "layer.1.layer_norm",
        **{f"cross_attention.{part}_proj": f"layer.1.EncDecAttention.{part}" for part in "qkvo"},
        "feed_forward_norm": f"{inside}.layer_norm",
        "feed_forward.gate_proj": f"{inside}.mlp.{gate}",
        "feed_forward.up_proj": f"{inside}.mlp.{up}",
        "feed_forward.down_proj": f"{inside}.mlp.wo",
        "feed_forward.router": f"{inside}.mlp.router.classifier",
    }
    expert = f"{inside}.mlp.experts.expert_{{e}}"
    return shared.StackNames(
        f"{stack}.block.", modules, shared.ExpertNames(f"{expert}.{gate}", f"{expert}.{up}", f"{expert}.wo")
    )


def _preset(size: tuple[int, int, int, int], experts: int, **own: Any) -> Preset:
    """d_model, d_ff, layers of each stack, heads of 64; every second layer is sparse, where not said otherwise."""
    d_model, d_ff, layers, heads = size
    sparse = own.pop("sparse", layers // 2)
    config = {
        "model_type": NAME,
        "d_model": d_model,
        "d_kv": 64,
        "d_ff": d_ff,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_sparse_encoder_layers": sparse,
        "num_sparse_decoder_layers": sparse,
        "num_heads": heads,
        "num_experts": experts,
    }
    source = own.pop("source")
    return Preset(_DEFAULTS | config | own, licence="Apache-2.0", source=source)


_GIN = "github.com/google/flaxformer flaxformer/t5x/configs/moe/models/switch_classic_{}.gin; arXiv:2101.03961"
PRESETS = {
    **{
        f"switch-base-{experts}": _preset(
            (768, 3072, 12, 12), experts, source=f"google/switch-base-{experts}; {_GIN.format('base')}"
        )
        for experts in (8, 16, 32, 64, 128, 256)
    },
    "switch-large-128": _preset((1024, 4096, 24, 16), 128, source=f"google/switch-large-128; {_GIN.format('large')}"),
    "switch-xxl-128": _preset(
        (4096, 10240, 24, 64),
        128,
        dense_act_fn="gated-gelu",
        tie_word_embeddings=False,
        source=f"google/switch-xxl-128; {_GIN.format('xxl')}",
    ),
    "switch-c-2048": _preset(
        (2080, 6144, 15, 30),
        2048,
        sparse=15,
        tie_word_embeddings=False,
        source=f"google/switch-c-2048; {_GIN.format('c')}",
    ),
}
