"""What families share: reading a config.json without trust, writing one, and the names of the usual tensors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

from moesaic.config import AttentionConfig, MlpConfig, ModelConfig, MoeConfig, NormConfig, RopeConfig
from moesaic.errors import ConfigError
from moesaic.families._rope import read_rope, rope_fields
from moesaic.models.weight_map import Piece, WeightMap
from moesaic.tensor_spec import TensorSpec

T = TypeVar("T")


class Preset(NamedTuple):
    """A ready-made configuration: its config.json, the licence of its weights, where the figures are from.

    is_verified: whether the figures were compared with the released files, or with what others count of them.
    """

    config: dict[str, Any]
    licence: str
    source: str
    is_verified: bool = True


@dataclass(frozen=True)
class HfFields:
    """The fields of a config.json, checked as they are read. Errors name the field, its value and what is known."""

    raw: dict[str, Any]

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these spellings that is there and not null."""
        return next((self.raw[name] for name in names if self.raw.get(name) is not None), default)

    def size(self, *names: str, default: int | None = None) -> int:
        """A whole number above 0; without a default it must be there."""
        value = self.get(*names, default=default)
        if value is None:
            raise ConfigError(f"the configuration has no {' or '.join(names)}; every {self._family} model states it")
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{names[0]}={value!r}; it must be a whole number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default=default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{name}={value!r}; it must be a number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r}; it must be true or false")
        return value

    def window(self, name: str = "sliding_window") -> int | None:
        return None if self.get(name) is None else self.size(name)

    def head_dim(self) -> int:
        """The stated one, else hidden_size / num_attention_heads."""
        if self.get("head_dim") is not None:
            return self.size("head_dim")
        hidden_size, num_heads = self.size("hidden_size"), self.size("num_attention_heads")
        if hidden_size % num_heads:
            raise ConfigError(
                f"hidden_size={hidden_size} does not divide over num_attention_heads={num_heads}; "
                "state head_dim or change one of them"
            )
        return hidden_size // num_heads

    def activation(self) -> str:
        name = self.get("hidden_act", default="silu")
        if name not in ("silu", "swish"):
            raise ConfigError(f"hidden_act={name!r} is not supported; known: silu")
        return "silu"

    def rope(
        self,
        default_theta: float,
        *,
        layout: Literal["half", "interleaved"] = "half",
        partial: float | None = None,
    ) -> RopeConfig:
        """Rotary positions in every spelling, scaled or not (see `read_rope`).

        partial: the share of a head that turns where nothing is said; None: this family turns whole heads.
        """
        return read_rope(self.raw, default_theta, head_dim=self.head_dim, layout=layout, partial=partial)

    def model(self, **parts: Any) -> ModelConfig:
        """A ModelConfig of the fields that all families spell alike, and the given parts."""
        if self.get("quantization_config") is not None:
            method = self.get("quantization_config", default={}).get("quant_method", "unnamed")
            raise ConfigError(
                f"quantization_config of method {method!r} is not supported; use an unquantized checkpoint"
            )
        return ModelConfig(
            family=self._family,
            vocab_size=self.size("vocab_size"),
            hidden_size=self.size("hidden_size"),
            context_length=self.size("max_position_embeddings"),
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            bos_token_id=self.token_id("bos_token_id"),
            eos_token_ids=self.token_ids("eos_token_id"),
            pad_token_id=self.token_id("pad_token_id"),
            **parts,
        )

    def token_ids(self, name: str) -> tuple[int, ...]:
        """An id, or a list of them, or nothing."""
        value = self.get(name, default=[])
        ids: list[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise ConfigError(f"{name}={value!r}; it must be a token id or a list of them")
        return tuple(ids)

    def token_id(self, name: str) -> int | None:
        """The only id, or the first of a list, or nothing."""
        return next(iter(self.token_ids(name)), None)

    @property
    def _family(self) -> str:
        return self.raw["model_type"]


def the_same(what: str, family: str, values: Iterable[T]) -> T:
    """The one value that all layers share. Raises ConfigError when they differ: `family` has one field for it."""
    distinct = list(dict.fromkeys(values))
    if len(distinct) != 1:
        raise refusal(family, f"{what} differs between layers ({distinct[0]!r} and {distinct[1]!r})")
    return distinct[0]


def refusal(family: str, why: str) -> ConfigError:
    """The error for a model that cannot be written as `family`."""
    other = "another family" if family == "moesaic" else "another family, such as moesaic,"
    return ConfigError(f"this model cannot be written as {family}: {why}; choose {other} or change the model")


def shared_attention(config: ModelConfig, *apart: str) -> AttentionConfig:
    """The attention that all layers share, `apart` from these fields, which are left at None."""
    alike = (replace(each, **dict.fromkeys(apart)) for each in attentions(config))
    return the_same("attention", config.family, alike)


def attentions(config: ModelConfig) -> list[AttentionConfig]:
    """The attention of every layer. Raises ConfigError where one keeps other things than keys and values."""
    found = [layer.attention for layer in config.layers if isinstance(layer.attention, AttentionConfig)]
    if len(found) < len(config.layers):
        raise refusal(config.family, "its attention keeps latents or entries (MlaConfig, CompressedAttentionConfig)")
    return found


def shared_norm(config: ModelConfig) -> NormConfig:
    return the_same("the norm", config.family, [*(layer.norm for layer in config.layers), config.decoder.final_norm])


def shared_moe(config: ModelConfig) -> MoeConfig:
    """The description that all MoE layers share."""
    found = [layer.feed_forward for layer in config.layers if isinstance(layer.feed_forward, MoeConfig)]
    if not found:
        raise refusal(config.family, "it has no MoE layer")
    return the_same("the MoE", config.family, found)


def shared_mlp(config: ModelConfig) -> MlpConfig:
    """The block that all layers of a dense model share."""
    if config.moe_layers:
        raise refusal(config.family, "it has MoE layers")
    mlp = shared_dense(config)
    assert mlp is not None, "a stack has layers"
    return mlp


def shared_dense(config: ModelConfig) -> MlpConfig | None:
    """The block that all layers without experts share; None where there are no such layers."""
    found = [layer.feed_forward for layer in config.layers if not isinstance(layer.feed_forward, MoeConfig)]
    if not found:
        return None
    mlp = the_same("the dense block", config.family, found)
    if not isinstance(mlp, MlpConfig):
        raise refusal(config.family, "it has Soft MoE layers")
    return mlp


def hf_fields(config: ModelConfig, architecture: str, *apart: str) -> dict[str, Any]:
    """The fields of a config.json that all families spell alike, `apart` from these of attention.

    Rotary positions are given in both spellings: transformers 5 reads `rope_parameters`, other readers `rope_theta`
    and `rope_scaling`.
    """
    attention = shared_attention(config, *apart)
    if attention.rope is None:
        raise refusal(config.family, "its layers have no rotary positions")
    return outer_fields(config, architecture) | {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
        **rope_fields(attention.rope, attention.head_dim),
    }


def outer_fields(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """Those of them that do not tell of attention."""
    eos = list(config.eos_token_ids)
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.layers),
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": shared_norm(config).eps,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": (eos[0] if len(eos) == 1 else eos) if eos else None,
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
    }


class ExpertNames(NamedTuple):
    """What a family calls the parts of an MoE layer; `{e}` stands for the expert."""

    router: str
    gate: str
    up: str
    down: str


_OUTER = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_LAYER = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    **{f"attention.{part}_proj": f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"attention.{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    **{f"feed_forward.{part}_proj": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    # Of a layer that predicts further tokens.
    "embedding_norm": "enorm",
    "hidden_norm": "hnorm",
    "projection": "eh_proj",
    "final_norm": "shared_head.norm",
}


def decoder_weight_map(
    config: ModelConfig,
    experts: ExpertNames | None = None,
    own: Mapping[str, tuple[Piece, ...]] = MappingProxyType({}),
) -> WeightMap:
    """The names that Llama gave the tensors of a decoder and most families kept, with a file tensor per expert.

    own: a layer's tensors that this family keeps otherwise, by our names within the layer; so are the pieces' names.
    """
    return {spec.name: _pieces(spec, config, experts, own) for spec in config.tensors()}


def _pieces(
    spec: TensorSpec, config: ModelConfig, experts: ExpertNames | None, own: Mapping[str, tuple[Piece, ...]]
) -> tuple[Piece, ...]:
    stack, *place = spec.name.split(".", 2)
    if stack not in ("layers", "mtp"):
        return _outer_pieces(spec, config)
    layer = int(place[0]) + (len(config.layers) if stack == "mtp" else 0)
    inner = place[1].removeprefix("layer.")
    if inner in own:
        return tuple(replace(piece, name=f"model.layers.{layer}.{piece.name}") for piece in own[inner])
    if experts and inner.startswith(("feed_forward.router.", "feed_forward.experts.")):
        return _moe_pieces(spec, f"model.layers.{layer}.", inner, experts)
    module, kind = inner.rsplit(".", 1)
    return (Piece(f"model.layers.{layer}.{_LAYER[module]}.{kind}"),)


def _outer_pieces(spec: TensorSpec, config: ModelConfig) -> tuple[Piece, ...]:
    """One tensor; the layers that predict further tokens are stored each with a copy of embedding and head."""
    module, kind = spec.name.rsplit(".", 1)
    copied = {"embedding": ("embed_tokens",), "head": ("shared_head.head",)}
    if config.tie_word_embeddings:
        copied = {"embedding": ("embed_tokens", "shared_head.head")}
    layers = range(len(config.layers), len(config.layers) + len(config.mtp))
    copies = (f"model.layers.{layer}.{name}.{kind}" for layer in layers for name in copied.get(module, ()))
    return (Piece(f"{_OUTER[module]}.{kind}"), *(Piece(name, is_copy=True) for name in copies))


def _moe_pieces(spec: TensorSpec, prefix: str, inner: str, names: ExpertNames) -> tuple[Piece, ...]:
    if inner == "feed_forward.router.weight":
        return (Piece(f"{prefix}{names.router}.weight"),)
    num_experts, rows = spec.shape[:2]
    if inner == "feed_forward.experts.down":
        return tuple(Piece(f"{prefix}{names.down.format(e=e)}.weight", (e,)) for e in range(num_experts))
    halves = ((names.gate, slice(0, rows // 2)), (names.up, slice(rows // 2, rows)))
    return tuple(
        Piece(f"{prefix}{name.format(e=e)}.weight", (e, half)) for e in range(num_experts) for name, half in halves
    )
