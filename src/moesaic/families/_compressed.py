"""The attention of DeepSeek-V4 in a config.json: which layers compress, by how much, and how their positions turn."""

from dataclasses import replace
from typing import Any

from moesaic.config import (
    CompressedAttentionConfig,
    CompressionConfig,
    EntryIndexerConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
)
from moesaic.errors import ConfigError
from moesaic.families._common import HfFields, refusal, the_same
from moesaic.families._rope import read_rope, rope_fields, turning_share

WINDOWED, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_RATES = {SPARSE: ("compress_rate_csa", 4), HEAVY: ("compress_rate_hca", 128)}


def read_attentions(hf: HfFields, num_layers: int, num_ahead: int, norm: NormConfig) -> list[CompressedAttentionConfig]:
    """One for each layer, then one for each that predicts further tokens.

    Raises ConfigError for a schedule that is not stated, or not one of these layers.
    """
    rates = {kind: _rate(hf, kind) for kind in _RATES}
    kinds = _kinds(hf, rates, num_layers, num_ahead)
    found = {kind: _attention(hf, kind, rates.get(kind), norm) for kind in set(kinds)}
    return [found[kind] for kind in kinds]


def _rate(hf: HfFields, kind: str) -> int:
    """How many tokens become one entry; what transformers took before it had one table has the last word there."""
    name, default = _RATES[kind]
    table = hf.get("compress_rates", default={})
    if not isinstance(table, dict) or not set(table) <= set(_RATES):
        raise ConfigError(f"compress_rates={table!r}; it must be a table of {' and '.join(_RATES)}")
    return hf.size(name, default=HfFields(table).size(kind, default=default))


def _kinds(hf: HfFields, rates: dict[str, int], num_layers: int, num_ahead: int) -> list[str]:
    """The kind of every layer, by `layer_types` or by `compress_ratios`, which may go on for layers after the last."""
    stated, ratios = hf.get("layer_types"), hf.get("compress_ratios")
    of_ratio = {0: WINDOWED} | {rate: kind for kind, rate in reversed(rates.items())}
    if ratios is not None and (not isinstance(ratios, list) or not set(ratios) <= set(of_ratio)):
        raise ConfigError(f"compress_ratios={ratios!r}; give one of {', '.join(map(str, of_ratio))} for each layer")
    by_ratio = [of_ratio[ratio] for ratio in ratios or []]
    if stated is None and len(by_ratio) < num_layers:
        given = f"compress_ratios={ratios!r}" if ratios else "no compress_ratios and no layer_types"
        raise ConfigError(f"{given}; give one of {', '.join(map(str, of_ratio))} for each of {num_layers} layers")
    kinds = by_ratio[:num_layers] if stated is None else stated
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {WINDOWED, *_RATES}:
        raise ConfigError(
            f"layer_types={kinds!r}; give {WINDOWED}, {SPARSE} or {HEAVY} for each of {num_layers} layers"
        )
    ahead = by_ratio[num_layers : num_layers + num_ahead]
    return [*kinds, *ahead, *[WINDOWED] * (num_ahead - len(ahead))]


def _attention(hf: HfFields, kind: str, ratio: int | None, norm: NormConfig) -> CompressedAttentionConfig:
    compression = None if ratio is None else CompressionConfig(ratio=ratio)
    if ratio is not None and kind == SPARSE:
        indexer = EntryIndexerConfig(
            num_heads=hf.size("index_n_heads"), head_dim=hf.size("index_head_dim"), top_k=hf.size("index_topk")
        )
        compression = CompressionConfig(ratio=ratio, overlap=True, indexer=indexer)
    return CompressedAttentionConfig(
        num_heads=hf.size("num_attention_heads"),
        head_dim=hf.size("head_dim"),
        query_rank=hf.size("q_lora_rank"),
        window=hf.size("sliding_window"),
        output_groups=hf.size("o_groups"),
        output_rank=hf.size("o_lora_rank"),
        rope=_rope(hf, "main" if ratio is None else "compress"),
        compression=compression,
        norm=norm,
    )


def _rope(hf: HfFields, label: str) -> RopeConfig:
    """Positions of windowed layers ("main"), and of those that compress.

    In two tables, or in the fields of other families, which are then of the latter but for `compress_rope_theta`.
    Cosines and sines are never scaled unless told: the released code does not.
    """
    parameters = hf.get("rope_parameters", "rope_scaling", default={})
    if not isinstance(parameters, dict):
        raise ConfigError(f"rope_parameters={parameters!r}; it must be a table")
    if isinstance(parameters.get(label), dict):
        own = dict(parameters[label])
    elif label == "main":
        own = {"rope_theta": hf.number("rope_theta", 10_000.0)}
    else:
        own = {name: value for name, value in parameters.items() if name not in ("main", "compress")}
        own["rope_theta"] = hf.number("compress_rope_theta", 160_000.0)
    if own.get("rope_type", own.get("type")) == "yarn" and own.get("attention_factor") is None:
        own["attention_factor"] = 1.0
    share = HfFields(own).get("partial_rotary_factor", default=hf.get("partial_rotary_factor"))
    own["partial_rotary_factor"] = _stated_share(hf) if share is None else share
    read = {"rope_parameters": own, "max_position_embeddings": hf.get("max_position_embeddings")}
    rope = read_rope(read, 10_000.0, head_dim=hf.head_dim, layout="interleaved", partial=1.0)
    turning, stated = rope.turning(hf.head_dim()), hf.get("qk_rope_head_dim")
    if stated is not None and stated != turning:
        raise ConfigError(f"qk_rope_head_dim={stated!r} but partial_rotary_factor says {turning}; keep one of them")
    return rope


def _stated_share(hf: HfFields) -> float:
    return turning_share(hf.size("qk_rope_head_dim", default=hf.head_dim() // 8), hf.head_dim())


def attention_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of all of this. Raises ConfigError for layers that differ where there is one field."""
    every = [each.attention for each in config.every_layer]
    attentions = [each for each in every if isinstance(each, CompressedAttentionConfig)]
    if len(attentions) < len(every):
        raise refusal(config.family, "not all of its attention is of windows and entries (CompressedAttentionConfig)")
    alike = (replace(each, rope=RopeConfig(), compression=None) for each in attentions)
    attention = the_same("attention", config.family, alike)
    kinds = [_kind(config.family, each.compression) for each in attentions]
    return {
        "num_attention_heads": attention.num_heads,
        "head_dim": attention.head_dim,
        "q_lora_rank": attention.query_rank,
        "sliding_window": attention.window,
        "o_groups": attention.output_groups,
        "o_lora_rank": attention.output_rank,
        "layer_types": kinds[: len(config.layers)],
        "compress_ratios": [each.compression.ratio if each.compression else 0 for each in attentions],
        **_compression_fields(config.family, attentions),
        **_rope_fields(config.family, attentions),
    }


def _kind(family: str, compression: CompressionConfig | None) -> str:
    if compression is None:
        return WINDOWED
    if compression.overlap != (compression.indexer is not None):
        raise refusal(family, "an indexer chooses among entries that overlap, and among no others")
    return SPARSE if compression.overlap else HEAVY


def _compression_fields(family: str, attentions: list[CompressedAttentionConfig]) -> dict[str, Any]:
    found = [each.compression for each in attentions if each.compression]
    rates = {SPARSE: 4, HEAVY: 128}
    for kind in rates:
        ratios = [each.ratio for each in found if _kind(family, each) == kind]
        rates[kind] = the_same(f"the ratio of {kind}", family, ratios or [rates[kind]])
    indexers = [each.indexer for each in found if each.indexer]
    if not indexers:
        return {"compress_rates": rates}
    indexer = the_same("the indexer", family, indexers)
    return {
        "compress_rates": rates,
        "index_n_heads": indexer.num_heads,
        "index_head_dim": indexer.head_dim,
        "index_topk": indexer.top_k,
    }


def _rope_fields(family: str, attentions: list[CompressedAttentionConfig]) -> dict[str, Any]:
    """Positions in the spellings of transformers 5, and of the released files where these can say it."""
    head_dim, turning = attentions[0].head_dim, the_same("rotary_dim", family, (each.rotary_dim for each in attentions))
    tables: dict[str, dict[str, Any]] = {}
    for label, theta in (("main", 10_000.0), ("compress", 160_000.0)):
        of_these = [each.rope for each in attentions if (each.compression is None) == (label == "main")]
        none_such = RopeConfig(theta=theta, layout="interleaved", rotary_dim=attentions[0].rope.rotary_dim)
        tables[label] = rope_fields(the_same("positions", family, of_these or [none_such]), head_dim)
    fields: dict[str, Any] = {
        "rope_theta": tables["main"]["rope_theta"],
        "compress_rope_theta": tables["compress"]["rope_theta"],
        "partial_rotary_factor": turning_share(turning, head_dim),
        "qk_rope_head_dim": turning,
        "rope_parameters": {label: table["rope_parameters"] for label, table in tables.items()},
    }
    if "rope_scaling" in tables["compress"] and "rope_scaling" not in tables["main"]:
        fields["rope_scaling"] = tables["compress"]["rope_scaling"]
    return fields
