"""DeepSeek-V4 Flash and Pro (arXiv:2606.19348): residual streams, compressed attention, hash-routed first layers.

transformers 5.23 differs from the released inference code, which is followed here, in what fp32 does not show: it
chooses experts and mixes streams in the model's dtype. It leaves out the layers that predict further tokens.
"""

from typing import Any

from moesaic.config import (
    ClampedSwiglu,
    HashSettings,
    HyperConnectionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    RouterConfig,
    StackConfig,
)
from moesaic.errors import ConfigError
from moesaic.families._common import HfFields, Preset, outer_fields, refusal, the_same
from moesaic.families._compressed import attention_fields, read_attentions
from moesaic.families._deepseek import num_ahead, require_known
from moesaic.models.weight_map import Piece, WeightMap
from moesaic.tensor_spec import TensorSpec

NAME = "deepseek_v4"
# As transformers spells its own files; released ones have the names of `weight_map`.
RENAMED = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.attn\.norm\.", ".attn.kv_norm."),
)
# Scales of packed weights lie beside them as `.scale`, powers of two; experts may be packed in four bits.
PACKED_AS = "scale"

_SCORES = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid", "softmax": "softmax"}
_HASHED, _LEARNED = "hash_moe", "moe"
# What the released configurations say of parts that are built in one way only.
_KNOWN = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "attention_bias": False,
    "mlp_bias": False,
}


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A config.json of `model_type` deepseek_v4. Raises ConfigError for what we cannot express.

    Its schedule of layers must be stated: the default of transformers is that of no released model.
    """
    hf = HfFields(raw)
    for name, known in _KNOWN.items():
        require_known(hf, name, known)
    num_layers, norm = hf.size("num_hidden_layers"), NormConfig(eps=hf.number("rms_norm_eps", 1e-6))
    streams = HyperConnectionConfig(
        num_streams=hf.size("hc_mult", default=4),
        sinkhorn_steps=hf.size("hc_sinkhorn_iters", default=20),
        eps=hf.number("hc_eps", 1e-6),
        norm_eps=norm.eps,
    )
    is_hashed = _hashed_layers(hf, num_layers)
    layers = tuple(
        LayerConfig(
            attention=attention,
            feed_forward=_moe(hf, seed=index if index < num_layers and is_hashed[index] else None),
            norm=norm,
            hyper_connection=streams,
        )
        for index, attention in enumerate(read_attentions(hf, num_layers, num_ahead(hf), norm))
    )
    return hf.model(decoder=StackConfig(layers=layers[:num_layers], final_norm=norm), mtp=layers[num_layers:])


def _hashed_layers(hf: HfFields, num_layers: int) -> list[bool]:
    """Which layers choose by a table: by a list of all layers' kinds, or the first so many, three where none says."""
    kinds, first = hf.get("mlp_layer_types"), hf.get("num_hash_layers")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {_HASHED, _LEARNED}:
            raise ConfigError(
                f"mlp_layer_types={kinds!r}; give {_HASHED} or {_LEARNED} for each of {num_layers} layers"
            )
        return [kind == _HASHED for kind in kinds]
    first = 3 if first is None else first
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ConfigError(f"num_hash_layers={first!r}; it must be a whole number, 0 or more")
    return [index < first for index in range(num_layers)]


def _moe(hf: HfFields, seed: int | None) -> MoeConfig:
    """Chosen by a table, which in a new model is drawn by `seed`, or by a learned router where there is none."""
    hf.activation()  # the files say silu; what they mean is this
    activation = ClampedSwiglu(limit=hf.number("swiglu_limit", 10.0))
    score: Any = _SCORES[require_known(hf, "scoring_func", *_SCORES)]
    table = None if seed is None else HashSettings(vocab_size=hf.size("vocab_size"), weight=score, seed=seed)
    router = RouterConfig(
        name="hash" if table else f"{score}_topk",
        num_experts=hf.size("n_routed_experts", "num_local_experts"),
        top_k=hf.size("num_experts_per_tok"),
        scaling_factor=hf.number("routed_scaling_factor", 1.5),
        selection_bias=table is None,
        settings=table,
    )
    width = hf.size("moe_intermediate_size")
    shared = MlpConfig(intermediate_size=width, activation=activation)
    return MoeConfig(router=router, intermediate_size=width, activation=activation, shared=shared)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Its config.json. Raises ConfigError for layers that differ where it has one field."""
    moes = [layer.feed_forward for layer in config.every_layer if isinstance(layer.feed_forward, MoeConfig)]
    if len(moes) < len(config.every_layer):
        raise refusal(NAME, "some of its layers have no experts")
    streams = config.decoder.hyper_connection
    if streams is None:
        raise refusal(NAME, "its layers have no hyper_connection")
    is_hashed = [isinstance(moe.router.settings, HashSettings) for moe in moes[: len(config.layers)]]
    return (
        outer_fields(config, "DeepseekV4ForCausalLM")
        | attention_fields(config)
        | _KNOWN
        | _moe_fields(moes)
        | {
            "mlp_layer_types": [_HASHED if hashed else _LEARNED for hashed in is_hashed],
            "num_hash_layers": sum(is_hashed),
            "hc_mult": streams.num_streams,
            "hc_sinkhorn_iters": streams.sinkhorn_steps,
            "hc_eps": streams.eps,
            "num_nextn_predict_layers": len(config.mtp),
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
    )


def _moe_fields(moes: list[MoeConfig]) -> dict[str, Any]:
    limits = (each.activation.limit if isinstance(each.activation, ClampedSwiglu) else None for each in moes)
    limit = the_same("the experts' activation", NAME, limits)
    if limit is None:
        raise refusal(NAME, f"its experts' activation is {moes[0].activation!r} and not a clamped SwiGLU")
    return {
        "moe_intermediate_size": the_same("the experts' width", NAME, (each.intermediate_size for each in moes)),
        "n_routed_experts": the_same("num_experts", NAME, (each.num_experts for each in moes)),
        "num_experts_per_tok": the_same("top_k", NAME, (each.router.top_k for each in moes)),
        "routed_scaling_factor": the_same("scaling_factor", NAME, (each.router.scaling_factor for each in moes)),
        "scoring_func": the_same("the routers' score", NAME, (_scoring(each.router) for each in moes)),
        "swiglu_limit": limit,
    }


def _scoring(router: RouterConfig) -> str:
    own = router.settings
    score = own.weight if isinstance(own, HashSettings) else router.name.removesuffix("_topk")
    said = next((said for said, ours in _SCORES.items() if ours == score), None)
    if said is None:
        raise refusal(NAME, f"a router scores by {score!r}")
    return said


_STREAMS = {"weight": "fn", "bias": "base", "scale": "scale"}
_COMPRESSOR = {
    "position_bias": "ape",
    "kv_proj.weight": "wkv.weight",
    "gate_proj.weight": "wgate.weight",
    "kv_norm.weight": "norm.weight",
}
_OUTER = {
    "embedding.weight": "embed.weight",
    "final_norm.weight": "norm.weight",
    "head.weight": "head.weight",
    **{f"stream_join.{ours}": f"hc_head_{theirs}" for ours, theirs in _STREAMS.items()},
}
_LAYER = {
    "attention_norm.weight": "attn_norm.weight",
    "attention.sinks": "attn.attn_sink",
    "attention.q_a_proj.weight": "attn.wq_a.weight",
    "attention.q_a_norm.weight": "attn.q_norm.weight",
    "attention.q_b_proj.weight": "attn.wq_b.weight",
    "attention.kv_proj.weight": "attn.wkv.weight",
    "attention.kv_norm.weight": "attn.kv_norm.weight",
    "attention.o_a_proj.weight": "attn.wo_a.weight",
    "attention.o_b_proj.weight": "attn.wo_b.weight",
    **{f"attention.compressor.{ours}": f"attn.compressor.{theirs}" for ours, theirs in _COMPRESSOR.items()},
    **{
        f"attention.indexer.compressor.{ours}": f"attn.indexer.compressor.{theirs}"
        for ours, theirs in _COMPRESSOR.items()
    },
    "attention.indexer.q_proj.weight": "attn.indexer.wq_b.weight",
    "attention.indexer.head_weights.weight": "attn.indexer.weights_proj.weight",
    "feed_forward_norm.weight": "ffn_norm.weight",
    "feed_forward.router.weight": "ffn.gate.weight",
    "feed_forward.router.selection_bias": "ffn.gate.bias",
    "feed_forward.router.table": "ffn.gate.tid2eid",
    "feed_forward.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "feed_forward.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    "feed_forward.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
    **{f"attention_connection.{ours}": f"hc_attn_{theirs}" for ours, theirs in _STREAMS.items()},
    **{f"feed_forward_connection.{ours}": f"hc_ffn_{theirs}" for ours, theirs in _STREAMS.items()},
}
# Of a layer that predicts further tokens.
_AHEAD = _OUTER | {"embedding_norm.weight": "enorm.weight", "hidden_norm.weight": "hnorm.weight"}


def weight_map(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in the released files."""
    return {spec.name: _pieces(spec, config.hidden_size) for spec in config.tensors()}


def _pieces(spec: TensorSpec, hidden_size: int) -> tuple[Piece, ...]:
    stack, _, rest = spec.name.partition(".")
    if stack not in ("layers", "mtp"):
        return (Piece(_OUTER[spec.name]),)
    index, _, inner = rest.partition(".")
    if stack == "mtp" and not inner.startswith("layer."):
        return _pieces_ahead(f"mtp.{index}.", inner, hidden_size)
    prefix, inner = f"{stack}.{index}.", inner.removeprefix("layer.")
    if inner.startswith("feed_forward.experts."):
        return _expert_pieces(spec, f"{prefix}ffn.experts")
    return (Piece(f"{prefix}{_LAYER[inner]}"),)


def _pieces_ahead(prefix: str, inner: str, hidden_size: int) -> tuple[Piece, ...]:
    """What surrounds a layer that predicts further tokens: one projection of ours is two of theirs, side by side."""
    if inner != "projection.weight":
        return (Piece(f"{prefix}{_AHEAD[inner]}"),)
    halves = (("e_proj", slice(0, hidden_size)), ("h_proj", slice(hidden_size, 2 * hidden_size)))
    return tuple(Piece(f"{prefix}{name}.weight", (slice(None), half)) for name, half in halves)


def _expert_pieces(spec: TensorSpec, prefix: str) -> tuple[Piece, ...]:
    num_experts, rows = spec.shape[:2]
    if spec.name.endswith(".down"):
        return tuple(Piece(f"{prefix}.{e}.w2.weight", (e,)) for e in range(num_experts))
    halves = (("w1", slice(0, rows // 2)), ("w3", slice(rows // 2, rows)))
    return tuple(Piece(f"{prefix}.{e}.{name}.weight", (e, half)) for e in range(num_experts) for name, half in halves)


_COMMON = {
    "model_type": NAME,
    "vocab_size": 129280,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "swiglu_limit": 10.0,
    "num_hash_layers": 3,
    "num_nextn_predict_layers": 1,
    "sliding_window": 128,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1048576,
    "rope_theta": 10_000.0,
    "compress_rope_theta": 160_000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
}

PRESETS = {
    "deepseek-v4-flash": Preset(
        _COMMON
        | {
            "hidden_size": 4096,
            "num_hidden_layers": 43,
            "num_attention_heads": 64,
            "q_lora_rank": 1024,
            "o_groups": 8,
            "n_routed_experts": 256,
            "moe_intermediate_size": 2048,
            "routed_scaling_factor": 1.5,
            "index_topk": 512,
            "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
        },
        licence="MIT",
        source="deepseek-ai/DeepSeek-V4-Flash; arXiv:2606.19348",
    ),
    "deepseek-v4-pro": Preset(
        _COMMON
        | {
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
            "o_groups": 16,
            "n_routed_experts": 384,
            "moe_intermediate_size": 3072,
            "routed_scaling_factor": 2.5,
            "index_topk": 1024,
            "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
        },
        licence="MIT",
        source="deepseek-ai/DeepSeek-V4-Pro; arXiv:2606.19348",
    ),
}
