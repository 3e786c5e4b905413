"""What DeepSeek's families share with those that followed them: latent attention, dense layers in front of routed ones,
shared experts as wide as several, sigmoid routing by selection biases, layers that predict further tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from moesaic.config import (
    AttentionConfig,
    GroupConfig,
    IndexerConfig,
    LayerConfig,
    MlaConfig,
    MlpConfig,
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
    decoder_weight_map,
    outer_fields,
    refusal,
    shared_dense,
    shared_moe,
    the_same,
)
from moesaic.families._rope import read_rope, rope_fields
from moesaic.models.weight_map import Piece, WeightMap


def require_known(hf: HfFields, name: str, *known: Any) -> Any:
    """The field's value, the first of `known` where nothing is said. Raises ConfigError for another one."""
    value = hf.get(name, default=known[0])
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not supported; known: {', '.join(map(repr, known))}")
    return value


def read_mla(hf: HfFields, layout: Literal["half", "interleaved"] = "interleaved") -> MlaConfig:
    """Latent attention of as many heads for keys as for queries."""
    num_heads, rope_dim = hf.size("num_attention_heads"), hf.size("qk_rope_head_dim")
    if hf.size("num_key_value_heads", default=num_heads) != num_heads:
        raise ConfigError(
            f"num_key_value_heads={hf.get('num_key_value_heads')!r} with num_attention_heads={num_heads}: "
            "latent attention has a key for every head; state the same number, or leave it out"
        )
    if "q_lora_rank" not in hf.raw:
        raise ConfigError("the configuration has no q_lora_rank; state it, or null for queries without a latent")
    return MlaConfig(
        num_heads=num_heads,
        query_rank=None if hf.get("q_lora_rank") is None else hf.size("q_lora_rank"),
        latent_rank=hf.size("kv_lora_rank"),
        nope_dim=hf.size("qk_nope_head_dim"),
        rope_dim=rope_dim,
        value_dim=hf.size("v_head_dim"),
        rope=read_rope(hf.raw, 10_000.0, head_dim=lambda: rope_dim, layout=layout),
        bias=hf.flag("attention_bias"),
    )


def mla_fields(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """The fields of a config.json of a model with latent attention, feed-forward parts and indexers aside."""
    found = [layer.attention for layer in config.layers if isinstance(layer.attention, MlaConfig)]
    if len(found) < len(config.layers):
        raise refusal(config.family, "not all of its attention is latent (MlaConfig)")
    attention = the_same("attention", config.family, (replace(each, indexer=None) for each in found))
    return outer_fields(config, architecture) | {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.query_rank,
        "kv_lora_rank": attention.latent_rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.value_dim,
        "attention_bias": attention.bias,
        **rope_fields(attention.rope, attention.rope_dim),
    }


def read_indexer(hf: HfFields, layout: Literal["half", "interleaved"]) -> IndexerConfig:
    return IndexerConfig(
        num_heads=hf.size("index_n_heads"),
        head_dim=hf.size("index_head_dim"),
        top_k=hf.size("index_topk"),
        layout=layout,
    )


def index_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of the indexers, and those in which transformers lists all layers' kinds."""
    attentions = (layer.attention for layer in config.layers if isinstance(layer.attention, MlaConfig))
    indexers = [each.indexer for each in attentions if not isinstance(each.indexer, int)]
    indexer = the_same("the indexer", config.family, indexers or [None])
    if indexer is None:
        raise refusal(config.family, "it has no indexer")
    return {
        "index_n_heads": indexer.num_heads,
        "index_head_dim": indexer.head_dim,
        "index_topk": indexer.top_k,
        "mlp_layer_types": ["sparse" if i in config.moe_layers else "dense" for i in range(len(config.layers))],
        "layer_types": ["indexed_attention"] * len(config.layers),
    }


def read_sigmoid_moe(hf: HfFields) -> MoeConfig:
    """DeepSeek-V3's: sigmoid scores, selection biases, groups by their two best experts."""
    require_known(hf, "scoring_func", "sigmoid")
    require_known(hf, "topk_method", "noaux_tc")
    num_groups = hf.size("n_group", default=1)
    router = RouterConfig(
        name="sigmoid_topk",
        num_experts=hf.size("n_routed_experts"),
        top_k=hf.size("num_experts_per_tok"),
        renormalize=hf.flag("norm_topk_prob", True),
        scaling_factor=hf.number("routed_scaling_factor", 1.0),
        selection_bias=True,
        groups=GroupConfig(num_groups=num_groups, top_groups=hf.size("topk_group")) if num_groups > 1 else None,
    )
    return moe_of(hf, router)


def moe_of(hf: HfFields, router: RouterConfig, *, shared_bias: bool = False) -> MoeConfig:
    """Experts for a router, and one shared expert as wide as `n_shared_experts` of them."""
    width = hf.size("moe_intermediate_size")
    shared = MlpConfig(
        intermediate_size=width * hf.size("n_shared_experts"), activation=hf.activation(), bias=shared_bias
    )
    return MoeConfig(router=router, intermediate_size=width, activation=hf.activation(), shared=shared)


def read_stack(
    hf: HfFields,
    attentions: Sequence[AttentionConfig | MlaConfig],
    moe: MoeConfig,
    *,
    norm: NormConfig,
    dense_bias: bool = False,
    predicts: bool = False,
) -> ModelConfig:
    """`first_k_dense_replace` dense layers, then routed ones.

    attentions: one a layer; layers that predict further tokens have the first one's.
    predicts: whether files of this family may hold layers that predict further tokens; their number counts for what
    it is only where it is stated.
    """
    require_known(hf, "moe_layer_freq", 1)
    first = _num_dense(hf, len(attentions))
    mlp = MlpConfig(intermediate_size=hf.size("intermediate_size"), activation=hf.activation(), bias=dense_bias)
    layers = (
        LayerConfig(attention=attention, feed_forward=mlp if index < first else moe, norm=norm)
        for index, attention in enumerate(attentions)
    )
    ahead = LayerConfig(attention=attentions[0], feed_forward=moe, norm=norm)
    return hf.model(
        decoder=StackConfig(layers=tuple(layers), final_norm=norm), mtp=(ahead,) * num_ahead(hf) if predicts else ()
    )


def _num_dense(hf: HfFields, num_layers: int) -> int:
    """How many layers in front are dense, by their number or by a list of all layers' kinds."""
    first, kinds = hf.get("first_k_dense_replace", default=0), hf.get("mlp_layer_types")
    if kinds is not None:
        first = kinds.count("dense") if isinstance(kinds, list) else -1
        if kinds != ["dense"] * first + ["sparse"] * (num_layers - first):
            raise ConfigError(
                f"mlp_layer_types={kinds!r} is not supported; known: dense, then sparse layers, {num_layers} in all"
            )
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first <= num_layers:
        raise ConfigError(f"first_k_dense_replace={first!r}; use a whole number from 0 to {num_layers}")
    return first


def num_ahead(hf: HfFields) -> int:
    """How many layers predict further tokens; none where nothing is said."""
    name = "num_nextn_predict_layers"
    return 0 if hf.get(name, default=0) == 0 else hf.size(name)


def stack_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of the feed-forward parts."""
    moe, dense = shared_moe(config), shared_dense(config)
    if moe.shared is None:
        raise refusal(config.family, "it has no shared expert")
    groups = moe.router.groups
    # Without a dense layer nothing reads its width, but transformers wants one: as wide as the active experts.
    width = dense.intermediate_size if dense else moe.router.top_k * moe.intermediate_size
    return {
        "intermediate_size": width,
        "moe_intermediate_size": moe.intermediate_size,
        "n_routed_experts": moe.router.num_experts,
        "n_shared_experts": moe.shared.intermediate_size // moe.intermediate_size,
        "num_experts_per_tok": moe.router.top_k,
        "norm_topk_prob": moe.router.renormalize,
        "routed_scaling_factor": moe.router.scaling_factor,
        "n_group": groups.num_groups if groups else 1,
        "topk_group": groups.top_groups if groups else 1,
        "first_k_dense_replace": config.moe_layers[0],
        "moe_layer_freq": 1,
    }


INDEXER_NAMES = {
    "attention.indexer.q_proj": "self_attn.indexer.wq_b",
    "attention.indexer.k_proj": "self_attn.indexer.wk",
    "attention.indexer.k_norm": "self_attn.indexer.k_norm",
    "attention.indexer.head_weights": "self_attn.indexer.weights_proj",
}
_OWN = {
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    **{f"attention.{part}_b_proj": f"self_attn.{part}_b_proj" for part in ("q", "kv")},
    "attention.q_a_proj": "self_attn.q_a_proj",
    **{
        f"feed_forward.shared_experts.{part}_proj": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")
    },
}


def deepseek_weight_map(config: ModelConfig, more: dict[str, str] | None = None) -> WeightMap:
    """Our tensors and their names in DeepSeek's files. more: modules that only this family has, by our names."""
    inside = "mlp.experts.{e}"
    names = ExpertNames("mlp.gate", gate=f"{inside}.gate_proj", up=f"{inside}.up_proj", down=f"{inside}.down_proj")
    own = {
        f"{ours}.{kind}": (Piece(f"{theirs}.{kind}"),)
        for ours, theirs in (_OWN | (more or {})).items()
        for kind in ("weight", "bias")
    }
    own["feed_forward.router.selection_bias"] = (Piece("mlp.gate.e_score_correction_bias"),)
    return decoder_weight_map(config, names, own)
