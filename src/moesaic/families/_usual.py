"""Decoders whose config.json has the usual fields, in any of the spellings that are about.

Of the `model_type`s in KNOWN it is known what besides the fields they are made of, and their counts are those of
transformers' modules, which a test compares. Others are taken at their word, and what was taken for granted is said.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from moesaic.config import (
    IndexerConfig,
    LayerConfig,
    MlpConfig,
    MoeConfig,
    NormConfig,
    OutlinedAttention,
    OutlinedMla,
    OutlinedModel,
    OutlinedMoe,
    RouterConfig,
    StackConfig,
)
from moesaic.config.outline import Outlined
from moesaic.errors import ConfigError
from moesaic.families._common import HfFields
from moesaic.fields import shown


class Usual(NamedTuple):
    """What the fields of a model_type do not say.

    gate: of attention's output, by what matrix. biased: of queries, keys and values, where nothing is said.
    inner: the field of the experts' width; None: the usual ones. shared: that of the shared expert. counted_bias: the
    router's selection bias is a parameter of transformers' module; expert_bias, router_bias: so are others. norms,
    moe_norms: of the hidden size, besides two a layer: of every layer, of MoE layers. first_dense, tied: where nothing
    is said.
    """

    head_norm: bool = False
    biased: bool = False
    output_bias: bool = True
    gate: Literal["none", "heads", "numbers"] = "none"
    sinks: bool = False
    inner: str | None = None
    shared: str | None = None
    counted_bias: bool = False
    expert_bias: bool = False
    router_bias: bool = False
    norms: int = 0
    moe_norms: int = 0
    first_dense: int = 0
    tied: bool = False


KNOWN: dict[str, Usual] = {
    "afmoe": Usual(head_norm=True, gate="numbers", norms=2, counted_bias=True, first_dense=1),
    "aria_text": Usual(inner="intermediate_size"),
    "axk1": Usual(moe_norms=1, first_dense=1),
    "deepseek": Usual(),
    "dots1": Usual(head_norm=True),
    "exaone_moe": Usual(head_norm=True, first_dense=1),
    "flint": Usual(head_norm=True, sinks=True, first_dense=2),
    "glm4_moe_lite": Usual(first_dense=1),
    "glm4v_moe_text": Usual(biased=True, output_bias=False, first_dense=1),
    "granitemoe_swa": Usual(sinks=True, inner="intermediate_size"),
    "hunyuan_v1_moe": Usual(head_norm=True, inner="intermediate_size", shared="intermediate_size"),
    "hy_v3": Usual(head_norm=True, first_dense=1),
    "kolibri1": Usual(head_norm=True, norms=2),
    "laguna": Usual(head_norm=True, gate="heads", counted_bias=True, first_dense=1),
    "mellum": Usual(head_norm=True),
    "minimax_m3": Usual(head_norm=True, inner="intermediate_size"),
    "minimax_m3_text": Usual(head_norm=True, inner="intermediate_size"),
    "minimax_m3_vl_text": Usual(head_norm=True, inner="intermediate_size"),
    "mistral4": Usual(),
    "qwen3_omni_moe_text": Usual(head_norm=True),
    "qwen3_vl_moe_text": Usual(head_norm=True, tied=True),
    "solar_open": Usual(),
    "step3p5": Usual(head_norm=True, gate="heads", first_dense=3),
    "step3p7": Usual(head_norm=True, gate="heads", first_dense=3),
}

_HEADS = ("num_attention_heads", "n_heads", "num_heads", "n_head")
_GROUPS = ("num_key_value_heads", "num_attention_groups", "num_kv_heads", "n_kv_heads", "num_query_groups")
_HEAD_DIM = ("head_dim", "attention_head_dim", "kv_channels", "head_size")
_BIASES = ("attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
    "n_activated_experts", "num_activated_experts", "experts_per_token", "num_selected_experts",
)  # fmt: skip
_INNER = ("moe_intermediate_size", "moe_ffn_hidden_size", "expert_ffn_hidden_size", "expert_intermediate_size")
_DENSE = ("dense_intermediate_size", "prefix_dense_intermediate_size", "intermediate_size", "ffn_hidden_size")
_SHARED = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
_SHARED_WIDTH = ("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim", "share_expert_dims")
_ONE_SHARED_WIDTH = ("moe_shared_expert_intermediate_size",)
_FIRST = ("first_k_dense_replace", "num_dense_layers", "n_dense_layers", "moe_layer_start_index")
_EVERY = ("moe_layer_freq", "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval")
_SPARSE_KIND = "minimax_m3_sparse"
_WINDOW_KINDS = ("sliding_attention", "chunked_attention", "local_attention")
_FULL_KINDS = ("full_attention", "global_attention", "attention", "nope_attention", "indexed_attention", _SPARSE_KIND)

_ELSEWHERE = (
    "mamba", "ssm_", "linear_", "conv_", "short_conv", "kda_", "delta_", "recurrent", "rwkv", "lstm", "hc_", "cca_",
    "ngram", "ple_", "encoder_layers", "decoder_layers", "moe_latent", "zero_expert", "kv_source_layers",
)  # fmt: skip
"""What begins the names of fields that tell of parts without a usual form: states, convolutions, further streams."""

_NO_MATTER = (
    "architectures", "auto_map", "attn_implementation", "torch_dtype", "dtype", "model_type", "transformers_version",
    "use_cache", "hidden_act", "hidden_activation", "pretraining_tp", "scoring_func", "norm_topk_prob", "topk_method",
    "n_group", "topk_group", "routed_scaling_factor", "seq_aux", "ep_size", "quantization_config", "max_window_layers",
    "max_position_embeddings", "attention_dropout", "text_config", "vision_config", "audio_config",
    "use_sliding_window", "is_encoder_decoder", "num_nextn_predict_layers", "id2label", "label2id", "_name_or_path",
)  # fmt: skip
_NO_MATTER_WITHIN = (
    "rope", "token_id", "dropout", "eps", "init", "loss", "output_", "scal", "theta", "router_", "swiglu", "alpha",
)  # fmt: skip


@dataclass(frozen=True)
class _Read(HfFields):
    """Fields of which it is known which were asked for, and whose lists, one value a layer, may all be the same."""

    asked: set[str]

    def get(self, *names: str, default: Any = None) -> Any:
        self.asked.update(names)
        return super().get(*names, default=default)

    def alike(self, *names: str, default: int | None = None) -> int:
        """Like `size`; also of a list with one value. Raises ConfigError for a list with several."""
        value = self.get(*names, default=default)
        if not isinstance(value, list):
            return self.size(*names, default=default)
        distinct = set(map(str, value))
        if len(distinct) != 1:
            name = next(name for name in names if self.raw.get(name) is not None)
            raise ConfigError(f"{name}={shown(value)} differs between layers; one value for all of them is known")
        return HfFields({names[0]: value[0], "model_type": self.raw["model_type"]}).size(names[0])

    def none(self, *names: str) -> bool:
        """Whether nothing is said, or that there are none."""
        value = self.get(*names)
        return value is None or value == 0 or (isinstance(value, list) and not any(value))


def usual(hf: HfFields) -> OutlinedModel:
    """A model of a KNOWN model_type."""
    return counted(hf.raw, KNOWN[hf.raw["model_type"]])


def counted(raw: dict[str, Any], kind: Usual) -> OutlinedModel:
    """A model of this kind."""
    return _model(_Read(raw, set()), kind)


def guessed(raw: dict[str, Any], unknown: ConfigError) -> OutlinedModel:
    """A model of a model_type that is not known, as its fields have it; `assumed` says what was taken for granted.

    Raises ConfigError, which begins as `unknown` does, for fields of parts that have no usual form, and for those that
    are missing.
    """
    elsewhere = [name for name, value in raw.items() if value and name.startswith(_ELSEWHERE)]
    if elsewhere:
        raise ConfigError(
            f"{unknown} Its fields {', '.join(elsewhere[:4])} tell of parts that cannot be counted from usual fields"
        )
    hf = _Read(raw, set())
    try:
        model = _model(hf, Usual(head_norm=any(hf.get(name) is True for name in _HEAD_NORMS)))
    except ConfigError as error:
        raise ConfigError(f"{unknown} As usual fields it cannot be read, either: {error}") from error
    unused = [name for name, value in raw.items() if value not in (None, False, [], {}) and not _is_used(name, hf)]
    return replace(model, assumed=_words(model, unused))


_HEAD_NORMS = ("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm")


def _is_used(name: str, hf: _Read) -> bool:
    return name in hf.asked or name in _NO_MATTER or any(part in name for part in _NO_MATTER_WITHIN)


def _words(model: OutlinedModel, unused: Sequence[str]) -> str:
    first = next(iter(model.layers)).attention
    kind = "latent attention" if isinstance(first, OutlinedMla) else "grouped-query attention"
    moe = [layer.feed_forward for layer in model.layers if isinstance(layer.feed_forward, MoeConfig)]
    experts = f"{moe[0].router.top_k} of {moe[0].num_experts} experts in {len(moe)} of them" if moe else "no experts"
    ignored = f"; of its fields nothing was made of {', '.join(unused)}" if unused else ""
    return (
        f"model_type {model.family!r} is not known: taken for a decoder of {len(model.layers)} layers of {kind}, "
        f"{experts}, gated blocks, two norms a layer{ignored}"
    )


def _model(hf: _Read, kind: Usual) -> OutlinedModel:
    number = hf.size("num_hidden_layers", "n_layers", "num_layers", "n_layer")
    sparse = _sparse(hf, number, kind.first_dense)
    windows = _windows(hf, number)
    attentions = _attentions(hf, kind, windows)
    block = _moe(hf, kind) if any(sparse) else None
    dense = None if all(sparse) else MlpConfig(intermediate_size=hf.alike(*_DENSE), bias=hf.flag("mlp_bias"))
    layers = tuple(
        LayerConfig(attention=attention, feed_forward=block if routes else dense)  # pyright: ignore[reportArgumentType]  one is there
        for attention, routes in zip(attentions, sparse, strict=True)
    )
    return OutlinedModel(
        family=hf.raw["model_type"],
        vocab_size=hf.size("vocab_size", "padded_vocab_size"),
        hidden_size=_hidden(hf),
        context_length=hf.size("max_position_embeddings", "max_seq_len", "seq_length", "n_positions", default=131_072),
        tie_word_embeddings=hf.flag("tie_word_embeddings", kind.tied),
        decoder=StackConfig(layers=layers, final_norm=NormConfig()),
    )


def _hidden(hf: _Read) -> int:
    return hf.size("hidden_size", "d_model", "n_embd", "dim")


def _sparse(hf: _Read, number: int, first_dense: int) -> list[bool]:
    """Which layers have experts: by a list of kinds, of zeros and ones or of numbers, or by a first one and a step."""
    if hf.none(*_EXPERTS) or hf.get(*_EXPERTS) == 1:
        return [False] * number
    kinds, listed = hf.get("mlp_layer_types"), hf.get("moe_layers_enum", "moe_layers")
    if kinds is not None:
        return _of_length([kind == "sparse" for kind in _list("mlp_layer_types", kinds)], number)
    if isinstance(listed, str | list):
        found = listed.split(",") if isinstance(listed, str) else listed
        return [index in {int(each) for each in found if str(each).strip().isdigit()} for index in range(number)]
    every = hf.get(*_EVERY, default=1)
    if isinstance(every, list):
        return _of_length([bool(each) for each in every], number)
    first, step = hf.get(*_FIRST, default=first_dense), hf.size(*_EVERY, default=1)
    dense = _list("mlp_only_layers", hf.get("mlp_only_layers", default=[]))
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first <= number:
        raise ConfigError(f"{_FIRST[0]}={first!r}; use a whole number from 0 to {number}")
    offset = 0 if hf.raw.get("moe_layer_freq") is not None or step == 1 else 1
    return [index >= first and (index + offset) % step == 0 and index not in dense for index in range(number)]


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{name}={shown(value)}; it must be a list")
    return value


def _of_length(found: list[bool], number: int) -> list[bool]:
    """The first `number`: lists of released configurations go on with layers that predict further tokens."""
    if len(found) < number:
        raise ConfigError(f"a list of {len(found)} kinds for {number} layers; it must have one for each")
    return found[:number]


def _windows(hf: _Read, number: int) -> list[str]:
    """Of each layer "window", "full", or "sparse" (attention to chosen blocks)."""
    kinds = hf.get("layer_types")
    if kinds is not None:
        known = (*_WINDOW_KINDS, *_FULL_KINDS)
        if strange := [kind for kind in _list("layer_types", kinds) if kind not in known]:
            raise ConfigError(f"layer_types has {strange[0]!r}; known: {', '.join(known)}")
        names = ["sparse" if k == _SPARSE_KIND else "window" if k in _WINDOW_KINDS else "full" for k in kinds]
        _of_length([True] * len(names), number)
        return names[:number]
    chosen = hf.get("sparse_attention_config", default={})
    if isinstance(chosen, dict) and isinstance(chosen.get("sparse_attention_freq"), list):
        return ["sparse" if each else "full" for each in chosen["sparse_attention_freq"]][:number]
    pattern = hf.get("sliding_window_pattern", "global_attn_every_n_layers")
    if isinstance(pattern, int) and pattern > 1 and hf.get("sliding_window") is not None:
        return ["full" if (index + 1) % pattern == 0 else "window" for index in range(number)]
    if isinstance(pattern, str) and pattern and hf.get("sliding_window") is not None:
        return ["window" if pattern[index % len(pattern)] == "L" else "full" for index in range(number)]
    return ["full"] * number


def _attentions(hf: _Read, kind: Usual, windows: Sequence[str]) -> Iterable[Any]:
    if hf.get("kv_lora_rank") is not None:
        return [_latent(hf, kind)] * len(windows)
    heads = hf.get("num_attention_heads_per_layer")
    if isinstance(heads, list):
        return [_grouped(hf, kind, window, each) for window, each in zip(windows, heads, strict=False)]
    made = {window: _grouped(hf, kind, window, None) for window in set(windows)}
    return [made[window] for window in windows]


def _latent(hf: _Read, kind: Usual) -> OutlinedMla:
    indexer = None
    if hf.get("index_topk") is not None:
        indexer = IndexerConfig(
            num_heads=hf.size("index_n_heads"), head_dim=hf.size("index_head_dim"), top_k=hf.size("index_topk")
        )
    return OutlinedMla(
        num_heads=hf.size(*_HEADS),
        query_rank=None if hf.none("q_lora_rank") else hf.size("q_lora_rank"),
        latent_rank=hf.size("kv_lora_rank"),
        nope_dim=hf.size("qk_nope_head_dim"),
        rope_dim=hf.size("qk_rope_head_dim"),
        value_dim=hf.size("v_head_dim"),
        bias=hf.flag("attention_bias"),
        indexer=indexer,
        more=_norms(hf, kind.norms),
    )


def _grouped(hf: _Read, kind: Usual, window: str, heads: int | None) -> OutlinedAttention:
    size = _hidden(hf)
    sliding = window == "window"
    number, groups = heads or hf.size(*_HEADS), hf.size(*_GROUPS, default=hf.size(*_HEADS))
    other = hf.get("attention_other_setting", default={})
    if sliding and isinstance(other, dict) and other:
        number = HfFields(other).size("num_attention_heads", default=number)
        groups = HfFields(other).size("num_attention_groups", default=groups)
    if sliding:
        number = hf.size("num_sliding_attention_heads", default=number)
    head = hf.size(*_HEAD_DIM, default=size // hf.size(*_HEADS))
    more = [*_norms(hf, kind.norms)]
    if kind.gate != "none":
        more.append(("output_gate.weight", (number * (head if kind.gate == "numbers" else 1), size), "attention"))
    index_size = 0
    if window == "sparse":
        index_size, tensors = _block_index(hf, size)
        more += tensors
    stated = [hf.flag(name) for name in _BIASES if hf.get(name) is not None]
    normed = kind.head_norm and not any(hf.get(name) is False for name in _HEAD_NORMS)
    return OutlinedAttention(
        num_heads=number,
        num_key_value_heads=groups,
        head_dim=head,
        window=hf.size("sliding_window", "sliding_window_size", "attention_chunk_size") if sliding else None,
        qkv_bias=any(stated) if stated else kind.biased,
        output_bias=kind.output_bias and hf.flag("attention_bias"),
        head_norm=NormConfig() if normed else None,
        sinks=kind.sinks,
        more=tuple(more),
        index_size=index_size,
    )


def _block_index(hf: _Read, size: int) -> tuple[int, list[Outlined]]:
    """What chooses blocks of keys (MiniMax-M3): numbers kept of a token, and its tensors."""
    own = HfFields(hf.get("sparse_attention_config", default={}) | {"model_type": hf.raw["model_type"]})
    heads = own.size("sparse_num_index_heads", default=hf.size("index_n_heads", default=4))
    width = own.size("sparse_index_dim", default=hf.size("index_head_dim", default=128))
    return width, [
        ("indexer.q_proj.weight", (heads * width, size), "attention"),
        ("indexer.k_proj.weight", (width, size), "attention"),
        ("indexer.norms", (2, width), "norm"),
    ]


def _norms(hf: _Read, number: int) -> tuple[Outlined, ...]:
    return (("norms", (number, _hidden(hf)), "norm"),) if number else ()


def _moe(hf: _Read, kind: Usual) -> MoeConfig:
    number, top_k = hf.alike(*_EXPERTS), hf.alike(*_TOP_K)
    if top_k > number:
        raise ConfigError(f"{top_k} of {number} experts a token; choose 1 to {number}")
    inner, size = hf.alike(*((kind.inner,) if kind.inner else (*_INNER, *_DENSE[2:]))), _hidden(hf)
    shared = hf.alike(kind.shared) if kind.shared else _shared(hf, inner)
    more: list[Outlined] = []
    if kind.counted_bias or kind.router_bias:
        more.append(("router.bias", (number,), "router"))
    if kind.moe_norms:
        more.append(("norms", (kind.moe_norms, size), "norm"))
    return OutlinedMoe(
        router=RouterConfig(name="softmax_topk", num_experts=number, top_k=top_k),
        intermediate_size=inner,
        bias=kind.expert_bias,
        shared=MlpConfig(intermediate_size=shared) if shared else None,
        more=tuple(more),
    )


def _shared(hf: _Read, inner: int) -> int:
    """Width of the shared expert: stated, or as wide as several; 0: none."""
    if not hf.none(*_SHARED_WIDTH) and hf.raw.get(_SHARED[0]) != 0:
        hf.get(*_SHARED)
        return hf.alike(*_SHARED_WIDTH)
    if hf.none(*_SHARED):
        return 0
    return hf.alike(*_SHARED) * hf.alike(*_ONE_SHARED_WIDTH, default=inner)
