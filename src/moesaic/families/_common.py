"""What families share: reading a config.json without trust, writing one, and the names of the usual tensors."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from moesaic.config import AttentionConfig, ModelConfig, MoeConfig, NormConfig, RopeConfig
from moesaic.errors import ConfigError
from moesaic.models.weight_map import Piece, WeightMap
from moesaic.tensor_spec import TensorSpec

T = TypeVar("T")


class Preset(NamedTuple):
    """A ready-made configuration: its config.json, the licence of its weights, where the figures are from."""

    config: dict[str, Any]
    licence: str
    source: str


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

    def rope(self, default_theta: float) -> RopeConfig:
        """Plain rotary positions, from `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling` (before)."""
        key = "rope_parameters" if self.get("rope_parameters") is not None else "rope_scaling"
        extra = self.get(key, default={})
        if not isinstance(extra, dict) or any(isinstance(value, dict) for value in extra.values()):
            raise ConfigError(f"{key}={extra!r} is not supported; known: one set of fields for all layers")
        kind = extra.get("rope_type", extra.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{key} of type {kind!r} is not supported; known: default")
        partial = extra.get("partial_rotary_factor", self.get("partial_rotary_factor", default=1.0))
        if partial != 1.0:
            raise ConfigError(f"partial_rotary_factor={partial!r} is not supported; known: 1.0")
        inner, outer = extra.get("rope_theta"), self.get("rope_theta")
        if inner is not None and outer is not None and inner != outer:
            raise ConfigError(f"rope_theta={outer!r} but {key} says {inner!r}; keep one of them")
        theta = HfFields({"rope_theta": inner if inner is not None else outer}).number("rope_theta", default_theta)
        return RopeConfig(theta=theta)

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
    return ConfigError(
        f"this model cannot be written as {family}: {why}; choose another family, such as moesaic, or change the model"
    )


def shared_attention(config: ModelConfig) -> AttentionConfig:
    return the_same("attention", config.family, (layer.attention for layer in config.layers))


def shared_norm(config: ModelConfig) -> NormConfig:
    return the_same("the norm", config.family, [*(layer.norm for layer in config.layers), config.decoder.final_norm])


def shared_moe(config: ModelConfig) -> MoeConfig:
    """The description that all MoE layers share."""
    found = [layer.feed_forward for layer in config.layers if isinstance(layer.feed_forward, MoeConfig)]
    if not found:
        raise refusal(config.family, "it has no MoE layer")
    return the_same("the MoE", config.family, found)


def hf_fields(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """The fields of a config.json that all families spell alike.

    The rotary base is given in both spellings: transformers 5 reads `rope_parameters`, other readers `rope_theta`.
    """
    attention = shared_attention(config)
    eos = list(config.eos_token_ids)
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": shared_norm(config).eps,
        "rope_theta": attention.rope.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope.theta},
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
}


def decoder_weight_map(config: ModelConfig, experts: ExpertNames | None = None) -> WeightMap:
    """The names that Llama gave the tensors of a decoder and most families kept, with a file tensor per expert."""
    return {spec.name: _pieces(spec, experts) for spec in config.tensors()}


def _pieces(spec: TensorSpec, experts: ExpertNames | None) -> tuple[Piece, ...]:
    if not spec.name.startswith("layers."):
        module, kind = spec.name.rsplit(".", 1)
        return (Piece(f"{_OUTER[module]}.{kind}"),)
    _, layer, inner = spec.name.split(".", 2)
    if experts and inner.startswith(("feed_forward.router.", "feed_forward.experts.")):
        return _moe_pieces(spec, f"model.layers.{layer}.", inner, experts)
    module, kind = inner.rsplit(".", 1)
    return (Piece(f"model.layers.{layer}.{_LAYER[module]}.{kind}"),)


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
