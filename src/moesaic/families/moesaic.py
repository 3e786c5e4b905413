"""Our own family: every combination of our parts, for models that no released architecture describes.

A config.json in flat fields, all but the sizes optional:

    hidden_size, num_hidden_layers, max_position_embeddings, tie_word_embeddings, ...   as other families spell them
    num_attention_heads, num_key_value_heads, head_dim, rope_theta, sliding_window, attention_bias, rms_norm_eps
    qk_norm                   whether query and key heads are normalised (true)
    attention_output_bias, qk_norm_eps     where they are not attention_bias and rms_norm_eps
    num_experts               0: the layer is dense, intermediate_size wide (mlp_bias: with biases)
    num_experts_per_tok, moe_intermediate_size, shared_intermediate_size (0: no shared expert), shared_bias
    router                    a name, or a table: name, its own settings, and those of any router (RouterConfig)
    capacity                  a table (CapacityConfig); left out: dropless
    expert_dropout            of the routed experts' inner activations, while training (Switch, arXiv:2101.03961, 2.4)
    soft_slots_per_expert     above 0: the layer is a Soft MoE, without router, capacity and shared expert
    first_dense_layers        so many layers are dense, in front
    overrides                 tables of such fields for some layers: [{"layers": [0, 1], "router": "hash"}]

Whatever differs between layers is written as `overrides`, so this family can express every decoder. Fields that it
does not know are refused. Each tensor has our own name in the files, and stays whole.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from moesaic.config import (
    AbsentConfig,
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    SoftMoeConfig,
    StackConfig,
)
from moesaic.config.capacity import CapacityConfig
from moesaic.config.router import ROUTER_KINDS, RouterConfig
from moesaic.errors import ConfigError
from moesaic.families._common import HfFields, Preset
from moesaic.fields import names_of, read_part, refuse_unknown, shown, table_of
from moesaic.models.weight_map import Piece, WeightMap
from moesaic.registry import unknown_name

NAME = "moesaic"
PRESETS: dict[str, Preset] = {}

_MODEL_FIELDS = (
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "final_norm_eps", "first_dense_layers",
    "overrides", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range",
)  # fmt: skip
_LAYER_FIELDS = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "sliding_window", "attention_bias",
    "attention_output_bias", "qk_norm", "qk_norm_eps", "rms_norm_eps", "hidden_act", "intermediate_size", "mlp_bias",
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_intermediate_size", "shared_bias",
    "router", "capacity", "expert_dropout", "soft_slots_per_expert",
)  # fmt: skip


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` moesaic. Raises ConfigError for unknown fields and impossible models."""
    refuse_unknown("the configuration", raw, (*_MODEL_FIELDS, *_LAYER_FIELDS))
    hf = HfFields(raw)
    layers = tuple(_layer(HfFields(fields)) for fields in _fields_of_layers(hf))
    norm = NormConfig(eps=hf.number("final_norm_eps", hf.number("rms_norm_eps", 1e-6)))
    return hf.model(decoder=StackConfig(layers=layers, final_norm=norm))


def _fields_of_layers(hf: HfFields) -> list[dict[str, Any]]:
    """The fields of every layer, with its overrides; later ones win."""
    count = hf.size("num_hidden_layers")
    first = hf.get("first_dense_layers", default=0)
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first <= count:
        raise ConfigError(f"first_dense_layers={first!r}; use a whole number from 0 to {count}")
    overrides = hf.get("overrides", default=[])
    if not isinstance(overrides, list) or not all(isinstance(table, dict) for table in overrides):
        raise ConfigError(f"overrides={shown(overrides)}; it must be a list of tables, as [[model.overrides]]")
    layers = [hf.raw | ({"num_experts": 0} if index < first else {}) for index in range(count)]
    for table in overrides:
        chosen = table.get("layers")
        refuse_unknown("overrides", table, ("layers", *_LAYER_FIELDS))
        if not isinstance(chosen, list) or any(i not in range(count) or isinstance(i, bool) for i in chosen):
            raise ConfigError(f"overrides: layers={chosen!r}; it must be a list of layers from 0 to {count - 1}")
        for index in chosen:
            layers[index] = layers[index] | {name: value for name, value in table.items() if name != "layers"}
    return layers


def _layer(hf: HfFields) -> LayerConfig:
    return LayerConfig(attention=_attention(hf), feed_forward=_feed_forward(hf), norm=_norm(hf, "rms_norm_eps", 1e-6))


def _feed_forward(hf: HfFields) -> MlpConfig | MoeConfig | SoftMoeConfig:
    if hf.get("num_experts", default=0) == 0:
        return _mlp(hf)
    return _moe(hf) if hf.get("soft_slots_per_expert", default=0) == 0 else _soft_moe(hf)


def _norm(hf: HfFields, name: str, default: float) -> NormConfig:
    return NormConfig(eps=hf.number(name, default))


def _attention(hf: HfFields) -> AttentionConfig:
    bias = hf.flag("attention_bias")
    return AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", "num_attention_heads"),
        head_dim=hf.head_dim(),
        rope=hf.rope(default_theta=10_000.0),
        window=hf.window(),
        qkv_bias=bias,
        output_bias=hf.flag("attention_output_bias", bias),
        head_norm=_norm(hf, "qk_norm_eps", hf.number("rms_norm_eps", 1e-6)) if hf.flag("qk_norm", True) else None,
    )


def _mlp(hf: HfFields) -> MlpConfig:
    return MlpConfig(
        intermediate_size=hf.size("intermediate_size"), activation=hf.activation(), bias=hf.flag("mlp_bias")
    )


def _moe(hf: HfFields) -> MoeConfig:
    shared = None
    if hf.get("shared_intermediate_size", default=0) != 0:
        shared = MlpConfig(
            intermediate_size=hf.size("shared_intermediate_size"),
            activation=hf.activation(),
            bias=hf.flag("shared_bias"),
        )
    return MoeConfig(
        router=_router(hf),
        intermediate_size=hf.size("moe_intermediate_size"),
        activation=hf.activation(),
        shared=shared,
        capacity=_capacity(hf),
        expert_dropout=hf.number("expert_dropout", 0.0),
    )


def _soft_moe(hf: HfFields) -> SoftMoeConfig:
    for name in ("num_experts_per_tok", "router", "capacity", "shared_intermediate_size"):
        if hf.get(name, default=0) != 0:
            raise ConfigError(f"{name} with soft_slots_per_expert: a Soft MoE routes nothing; leave one of them out")
    return SoftMoeConfig(
        num_experts=hf.size("num_experts"),
        slots_per_expert=hf.size("soft_slots_per_expert"),
        intermediate_size=hf.size("moe_intermediate_size"),
        activation=hf.activation(),
        expert_dropout=hf.number("expert_dropout", 0.0),
    )


def _capacity(hf: HfFields) -> CapacityConfig | None:
    table = hf.get("capacity")
    return None if table is None else read_part(CapacityConfig, table, "capacity")


def _router(hf: HfFields) -> RouterConfig:
    """The router of a name or a table: its own settings stand beside those of any router."""
    given = hf.get("router", default="softmax_topk")
    table = {"name": given} if isinstance(given, str) else given
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        raise ConfigError(f"router={shown(given)}; it must be a name or a table with one: {', '.join(ROUTER_KINDS)}")
    if table["name"] not in ROUTER_KINDS:
        raise unknown_name("router", table["name"], sorted(ROUTER_KINDS))
    kind, where = ROUTER_KINDS[table["name"]].settings, f"router {table['name']!r}"
    own = [] if kind is None else names_of(kind)
    common = [name for name in names_of(RouterConfig) if name not in ("num_experts", "top_k", "settings")]
    refuse_unknown(where, table, (*common, *own))
    known: dict[str, Any] = {"num_experts": hf.size("num_experts"), "top_k": hf.size("num_experts_per_tok")}
    if kind is not None:
        settings = {name: value for name, value in table.items() if name in own}
        if "vocab_size" in own:
            settings.setdefault("vocab_size", hf.size("vocab_size"))
        known["settings"] = read_part(kind, settings, where)
    return read_part(RouterConfig, {name: table[name] for name in table if name in common}, where, **known)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json: the fields of most layers, and `overrides` for the others."""
    layers = [_fields_of(layer) for layer in config.layers]
    usual = _most_frequent(layers)
    eos = list(config.eos_token_ids)
    return {
        "architectures": ["MoesaicForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(layers),
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": (eos[0] if len(eos) == 1 else eos) if eos else None,
        "pad_token_id": config.pad_token_id,
        "final_norm_eps": config.decoder.final_norm.eps,
        **usual,
        "overrides": list(_overrides(usual, layers)),
    }


def _most_frequent(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields that most layers have; of equally many the first, routed layers before dense ones."""
    counts = Counter(repr(fields) for fields in layers)
    return max(layers, key=lambda fields: (counts[repr(fields)], fields["num_experts"] > 0))


def _overrides(usual: dict[str, Any], layers: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One table for all layers that differ in the same way; null where a field is left out."""
    alike: dict[str, list[int]] = {}
    for index, fields in enumerate(layers):
        alike.setdefault(repr(fields), []).append(index)
    for indices in alike.values():
        fields = layers[indices[0]]
        names = [name for name in _LAYER_FIELDS if fields.get(name) != usual.get(name)]
        if names:
            yield {"layers": indices} | {name: fields.get(name) for name in names}


def _fields_of(layer: LayerConfig) -> dict[str, Any]:
    attention, block, eps = layer.attention, layer.feed_forward, layer.norm.eps
    assert not isinstance(block, AbsentConfig), "no model that is only described is of this family"
    if not isinstance(attention, AttentionConfig):
        raise ConfigError(f"a {NAME} model has attention with keys and values (AttentionConfig), no other")
    fields = {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
        "rope_theta": attention.rope.theta if attention.rope else None,
        "sliding_window": attention.window,
        "attention_bias": attention.qkv_bias,
        "attention_output_bias": attention.output_bias,
        "qk_norm": attention.head_norm is not None,
        "qk_norm_eps": attention.head_norm.eps if attention.head_norm else eps,
        "rms_norm_eps": eps,
        "hidden_act": block.activation,
    }
    if isinstance(block, MlpConfig):
        return fields | {"num_experts": 0, "intermediate_size": block.intermediate_size, "mlp_bias": block.bias}
    if isinstance(block, SoftMoeConfig):
        return fields | _fields_of_soft_moe(block)
    return fields | _fields_of_moe(block)


def _fields_of_soft_moe(moe: SoftMoeConfig) -> dict[str, Any]:
    return {
        "num_experts": moe.num_experts,
        "soft_slots_per_expert": moe.slots_per_expert,
        "moe_intermediate_size": moe.intermediate_size,
        "expert_dropout": moe.expert_dropout,
    }


def _fields_of_moe(moe: MoeConfig) -> dict[str, Any]:
    router = table_of(moe.router, "num_experts", "top_k", "settings", "renormalize")
    if moe.router.kind.renormalize is None and not moe.router.renormalize:
        router["renormalize"] = False
    if moe.router.settings is not None:
        router |= table_of(moe.router.settings)
    return {
        "num_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "shared_intermediate_size": moe.shared.intermediate_size if moe.shared else 0,
        "shared_bias": moe.shared.bias if moe.shared else False,
        "router": router,
        "capacity": table_of(moe.capacity) if moe.capacity else None,
        "expert_dropout": moe.expert_dropout,
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors under their own names."""
    return {spec.name: (Piece(spec.name),) for spec in config.tensors()}
