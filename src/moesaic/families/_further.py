"""MoE architectures without linear layers that are described from their configurations and not run yet.

Shapes are those of transformers 5's modules, which a test compares.
"""

from dataclasses import replace

from moesaic.config import (
    AttentionConfig,
    LayerConfig,
    MlaConfig,
    MlpConfig,
    NormConfig,
    OutlinedAttention,
    OutlinedModel,
    OutlinedMoe,
    RouterConfig,
)
from moesaic.config.outline import Outlined
from moesaic.config.router import NullSettings
from moesaic.errors import ConfigError
from moesaic.families import _outlines as outlines
from moesaic.families._common import HfFields

_FULL, _SLIDING = "full_attention", "sliding_attention"


def mimo_v2_flash(hf: HfFields) -> OutlinedModel:
    """MiMo-V2-Flash: windows of 128 tokens with sinks, full attention every sixth layer; values narrower than keys."""
    number = hf.size("num_hidden_layers")
    if hf.get("layer_types") is None and isinstance(hf.get("hybrid_layer_pattern"), list):
        sliding = [bool(kind) for kind in hf.get("hybrid_layer_pattern")]
    else:
        usual = [_SLIDING if index and (index + 1) % 6 else _FULL for index in range(number)]
        kinds = usual if hf.get("layer_types") is None else outlines.layer_kinds(hf, (_FULL, _SLIDING), "layer_types")
        sliding = [kind == _SLIDING for kind in kinds]
    full = OutlinedAttention(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads"),
        head_dim=hf.size("head_dim", default=192),
        value_dim=hf.size("v_head_dim", default=128),
    )
    # Where nothing is said of the sliding layers, as in files that transformers writes, they have twice as many keys.
    groups = hf.size("swa_num_key_value_heads", default=2 * full.num_key_value_heads)
    window = replace(
        full,
        num_heads=hf.size("swa_num_attention_heads", default=full.num_heads),
        num_key_value_heads=groups,
        window=hf.size("sliding_window", default=128),
        sinks=True,
    )
    moe = outlines.moe(
        hf, hf.size("n_routed_experts"), hf.size("num_experts_per_tok"), hf.size("moe_intermediate_size"),
        shared=hf.get("n_shared_experts", default=0) * hf.size("moe_intermediate_size"), selection_bias=True,
    )  # fmt: skip
    dense = MlpConfig(intermediate_size=hf.size("intermediate_size"))
    layers = (
        LayerConfig(attention=window if slides else full, feed_forward=moe if routes else dense)
        for slides, routes in zip(sliding, _routing(hf, number, first_dense=1), strict=True)
    )
    return outlines.model(hf, layers, context=131_072)


def _routing(hf: HfFields, number: int, first_dense: int) -> list[bool]:
    """Which layers route: by a list of kinds, one of zeros and ones, or from one on."""
    if hf.get("mlp_layer_types") is not None:
        return [kind == "sparse" for kind in outlines.layer_kinds(hf, ("dense", "sparse"), "mlp_layer_types")]
    if isinstance(hf.get("moe_layer_freq"), list):
        return [bool(routes) for routes in hf.get("moe_layer_freq")]
    first = hf.get("first_k_dense_replace", default=first_dense)
    return [index >= first for index in range(number)]


def flex_olmo(hf: HfFields) -> OutlinedModel:
    """FlexOlmo (arXiv:2507.07024): OLMoE's parts, with norms after them."""
    attention = AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", default=hf.size("num_attention_heads")),
        head_dim=hf.head_dim(),
        projection_norm=NormConfig(),
    )
    numbers = hf.size("num_experts"), hf.size("num_experts_per_tok", default=5)
    moe = outlines.moe(hf, *numbers, hf.size("intermediate_size"))
    layer = LayerConfig(attention=attention, feed_forward=moe)
    return outlines.model(hf, [layer] * hf.size("num_hidden_layers"), context=4096)


def longcat_flash(hf: HfFields) -> OutlinedModel:
    """LongCat-Flash (arXiv:2509.01322): in each layer two of latent attention and MLP, and experts beside the first.

    A token's choices may fall on experts that compute nothing. Each layer is two here.
    """
    attention = MlaConfig(
        num_heads=hf.size("num_attention_heads"),
        latent_rank=hf.size("kv_lora_rank"),
        nope_dim=hf.size("qk_nope_head_dim"),
        rope_dim=hf.size("qk_rope_head_dim"),
        value_dim=hf.size("v_head_dim"),
        query_rank=None if hf.get("q_lora_rank") is None else hf.size("q_lora_rank"),
    )
    dense = MlpConfig(intermediate_size=hf.size("ffn_hidden_size", "intermediate_size"))
    null = hf.get("zero_expert_num", default=0)
    moe = OutlinedMoe(
        router=RouterConfig(
            name="null_topk" if null else "softmax_topk",
            num_experts=hf.size("n_routed_experts"),
            top_k=hf.size("moe_topk", "num_experts_per_tok"),
            settings=NullSettings(num_null_experts=null) if null else None,
        ),
        intermediate_size=hf.size("expert_ffn_hidden_size", "moe_intermediate_size"),
        shared=dense,
    )
    pair = (
        LayerConfig(attention=attention, feed_forward=moe),
        LayerConfig(attention=attention, feed_forward=dense),
    )
    return outlines.model(hf, pair * hf.size("num_layers", "num_hidden_layers"), context=131_072)


def gemma4_text(hf: HfFields) -> OutlinedModel:
    """Gemma 4 with experts: windows, and full attention with wider heads; an MLP beside the experts, seven norms."""
    if not hf.flag("enable_moe_block") or hf.get("hidden_size_per_layer_input", default=0):
        raise ConfigError("a gemma4_text without experts, or with inputs of each layer, is not known here")
    size = hf.size("hidden_size")
    more: list[Outlined] = [("norms", (5, size), "norm")]  # besides one before each part
    num_heads, groups = hf.size("num_attention_heads"), hf.size("num_key_value_heads")
    window = OutlinedAttention(
        num_heads=num_heads, num_key_value_heads=groups, head_dim=hf.size("head_dim"), head_norm=NormConfig(),
        window=hf.size("sliding_window"), more=tuple(more),
    )  # fmt: skip
    same = hf.flag("attention_k_eq_v")
    full = OutlinedAttention(
        num_heads=num_heads, head_dim=hf.size("global_head_dim", default=hf.size("head_dim")), head_norm=NormConfig(),
        num_key_value_heads=hf.size("num_global_key_value_heads", default=groups) if same else groups,
        values_are_keys=same, more=tuple(more),
    )  # fmt: skip
    number = hf.size("num_experts")
    moe = outlines.moe(
        hf, number, hf.size("top_k_experts"), hf.size("moe_intermediate_size"),
        shared=hf.size("intermediate_size"),
        more=(("router.scale", (size,), "router"), ("router.expert_scale", (number,), "router")),
    )  # fmt: skip
    kinds = outlines.layer_kinds(hf, (_SLIDING, _FULL), "layer_types")
    layers = [LayerConfig(attention=window if kind == _SLIDING else full, feed_forward=moe) for kind in kinds]
    return outlines.model(_tied(hf), layers, context=131_072)


def _tied(hf: HfFields) -> HfFields:
    return HfFields({"tie_word_embeddings": True} | {k: v for k, v in hf.raw.items() if v is not None})
