"""DBRX (Databricks, 2024): LayerNorm; queries, keys and values clipped and in one matrix; experts as rows of three.

transformers 5.23 turns heads by `rope_parameters` and never by `attn_config.rope_theta`, where the released files have
the base that they were trained with (500,000): it reads them with 10,000. Here both are read, must not contradict each
other, and are written alike.
"""

from typing import Any

from moesaic.config import AttentionConfig, LayerConfig, ModelConfig, MoeConfig, NormConfig, RouterConfig, StackConfig
from moesaic.errors import ConfigError
from moesaic.families._common import HfFields, Preset, hf_fields, refusal, shared_attention, shared_moe
from moesaic.models.weight_map import Piece, WeightMap
from moesaic.tensor_spec import TensorSpec

NAME = "dbrx"
_NORM = NormConfig(eps=1e-5, kind="layer")
# Its fields, and those of two tables within, by the names that other families have for them.
_OUTER = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "max_position_embeddings": "max_seq_len",
}
_ATTENTION = {"num_key_value_heads": "kv_n_heads", "clip_qkv": "clip_qkv", "rope_theta": "rope_theta"}
_EXPERTS = {
    "intermediate_size": "ffn_hidden_size",
    "num_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_top_k",
}


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` dbrx. Raises ConfigError for what we cannot express."""
    attention, experts = _table(raw, "attn_config"), _table(raw, "ffn_config")
    hf = HfFields(raw | _renamed(raw, _OUTER) | _renamed(attention, _ATTENTION) | _renamed(experts, _EXPERTS))
    layer = LayerConfig(attention=_attention(hf), feed_forward=_moe(hf, experts), norm=_NORM)
    return hf.model(decoder=StackConfig(layers=(layer,) * hf.size("num_hidden_layers"), final_norm=_NORM))


def _table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    table = raw.get(name)
    if not isinstance(table, dict):
        raise ConfigError(f"{name}={table!r}; every {NAME} model states it, as a table of fields")
    return table


def _renamed(fields: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {ours: fields[theirs] for ours, theirs in names.items() if theirs in fields}


def _attention(hf: HfFields) -> AttentionConfig:
    return AttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        num_key_value_heads=hf.size("num_key_value_heads", default=1),
        head_dim=hf.head_dim(),
        rope=hf.rope(default_theta=10_000.0),
        clip=None if hf.get("clip_qkv") is None else hf.number("clip_qkv", 0.0),
    )


def _moe(hf: HfFields, experts: dict[str, Any]) -> MoeConfig:
    power = experts.get("moe_normalize_expert_weights", 1)
    if power not in (1, None):
        raise ConfigError(f"moe_normalize_expert_weights={power!r} is not supported; known: 1 (their sum), null")
    activation = experts.get("ffn_act_fn") or {"name": "silu"}
    if activation != {"name": "silu"}:
        raise ConfigError(f"ffn_act_fn={activation!r} is not supported; known: silu")
    router = RouterConfig(
        name="softmax_topk",
        num_experts=hf.size("num_experts", default=4),
        top_k=hf.size("num_experts_per_tok", default=1),
        renormalize=power == 1,
    )
    return MoeConfig(router=router, intermediate_size=hf.size("intermediate_size", default=3584))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    attention, moe = shared_attention(config), shared_moe(config)
    if len(config.moe_layers) != len(config.layers):
        raise refusal(NAME, "some of its layers are dense")
    if config.tie_word_embeddings:
        raise refusal(NAME, "its head is the embedding")
    common = hf_fields(config, "DbrxForCausalLM")
    kept = ("architectures", "model_type", "vocab_size", "rope_parameters", "rope_scaling", "tie_word_embeddings",
            "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache")  # fmt: skip
    return {name: common[name] for name in kept if name in common} | {
        **{theirs: common[ours] for ours, theirs in _OUTER.items()},
        "attn_config": {
            "kv_n_heads": attention.num_key_value_heads,
            "clip_qkv": attention.clip,
            "rope_theta": common["rope_theta"],
            "attn_pdrop": 0.0,
        },
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": moe.intermediate_size,
            "moe_num_experts": moe.router.num_experts,
            "moe_top_k": moe.router.top_k,
            "moe_normalize_expert_weights": 1.0 if moe.router.renormalize else None,
            "moe_loss_weight": 0.05,
        },
        "output_router_logits": False,
    }


_NAMES = {
    "embedding.weight": "transformer.wte.weight",
    "final_norm.weight": "transformer.norm_f.weight",
    "head.weight": "lm_head.weight",
    "attention_norm.weight": "norm_attn_norm.norm_1.weight",
    "attention.o_proj.weight": "norm_attn_norm.attn.out_proj.weight",
    "feed_forward_norm.weight": "norm_attn_norm.norm_2.weight",
    "feed_forward.router.weight": "ffn.router.layer.weight",
}


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and where they are in DBRX's files: w1 is the gate, v1 up, w2 down; all experts are rows of each."""
    return {spec.name: tuple(_pieces(spec, config)) for spec in config.tensors()}


def _pieces(spec: TensorSpec, config: ModelConfig) -> list[Piece]:
    if not spec.name.startswith("layers."):
        return [Piece(_NAMES[spec.name])]
    _, layer, inner = spec.name.split(".", 2)
    prefix = f"transformer.blocks.{layer}."
    if inner in _NAMES:
        return [Piece(prefix + _NAMES[inner])]
    if inner.startswith("attention."):
        attention = shared_attention(config)
        query, other = (heads * attention.head_dim for heads in (attention.num_heads, attention.num_key_value_heads))
        start = {"q_proj": 0, "k_proj": query, "v_proj": query + other}[inner.split(".")[1]]
        rows = slice(start, start + spec.shape[0])
        return [Piece(f"{prefix}norm_attn_norm.attn.Wqkv.weight", file_index=(rows,))]
    width = shared_moe(config).intermediate_size
    rows = [slice(e * width, (e + 1) * width) for e in range(spec.shape[0])]
    experts = f"{prefix}ffn.experts.mlp."
    if inner == "feed_forward.experts.down":
        return [Piece(f"{experts}w2", (e,), (at,), transposed=True) for e, at in enumerate(rows)]
    halves = (("w1", slice(0, width)), ("v1", slice(width, 2 * width)))
    return [Piece(experts + name, (e, half), (at,)) for name, half in halves for e, at in enumerate(rows)]


PRESETS = {
    "dbrx": Preset(
        {
            "model_type": NAME,
            "vocab_size": 100352,
            "d_model": 6144,
            "n_heads": 48,
            "n_layers": 40,
            "max_seq_len": 32768,
            "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500_000.0},
            "ffn_config": {
                "ffn_hidden_size": 10752,
                "moe_num_experts": 16,
                "moe_top_k": 4,
                "moe_normalize_expert_weights": 1,
            },
        },
        licence="Databricks Open Model License",
        source="databricks/dbrx-base",
    ),
}
