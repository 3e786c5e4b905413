"""A recipe: everything that decides a run, as frozen data that reads from TOML and writes to JSON and TOML."""

import dataclasses
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moesaic.config import ModelConfig, MoeConfig
from moesaic.errors import ConfigError
from moesaic.families import family
from moesaic.fields import names_of, refuse_unknown, settle, shown
from moesaic.kernels import devices

Points = tuple[tuple[int, float], ...]
Scheduled = float | Points
"""A number, or (step, value) points: linear between them, flat before the first and after the last."""

MOST_WARMUP_STEPS = 50  # where the recipe leaves the warm-up open


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. Lengths are in tokens and steps; one step sees micro_batches * batch_size sequences.

    warmup_steps: -1 stands for a tenth of the steps, 50 at most.
    schedule: "cosine", or "wsd" (warm-up, stable, then a decay over the last `decay_fraction` of the steps).
    optimizer: "adamw", or "muon" (matrices of layers by Muon, everything else by AdamW).
    device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:1"; see kernels/devices.py.
    precision: "fp32", or "bf16" (weights and activations; masters and moments stay fp32).
    recompute: "none", or "layers" (activations are computed again in backward, with the routing replayed).
    ema_decay: of an exponential moving average of the weights, kept beside them; 0 keeps none.
    mtp_coefficient: of the mean loss of the layers that predict further tokens, where a model has them (DeepSeek-V3,
    arXiv:2412.19437, eq. 25, where it is 0.3 and later 0.1); at 0 they stay as they are.
    balance_losses: (name of `routing.balancers.BALANCE_LOSSES`, coefficient) pairs, each averaged over layers.
    selection_bias_rate: how far selection biases move a step, for routers that have one. selection_bias_rule: "sign",
    or "proportional" (times (mean - load) / mean). selection_bias_centered: the mean of each move is taken off it.
    doctor: "off", "advise" (says what is ill about routers and experts, and what it would do), or "act" (does it, and
    undoes what makes the held-out loss worse; see docs/health.md).
    keep_checkpoints, keep_best: how many of the newest and of the best (by held-out loss) checkpoints stay.

    Raises ConfigError for a value of the wrong type, out of range, or in conflict with another.
    """

    steps: int = 1000
    batch_size: int = 16
    sequence_length: int = 256
    micro_batches: int = 1
    learning_rate: float = 3e-3
    warmup_steps: int = -1
    final_fraction: float = 0.1
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_fraction: float = 0.2
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    muon_momentum: float = 0.95
    clip_norm: float = 1.0
    device: str = devices.AUTO
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "layers"] = "none"
    compile: bool = False
    ema_decay: float = 0.0
    mtp_coefficient: Scheduled = 0.3
    balance_losses: tuple[tuple[str, Scheduled], ...] = (("switch", 0.01),)
    selection_bias_rate: Scheduled = 0.001
    selection_bias_rule: Literal["sign", "proportional"] = "sign"
    selection_bias_centered: bool = False
    doctor: Literal["off", "advise", "act"] = "off"
    seed: int = 0
    evaluate_every: int = 100
    evaluate_tokens: int = 8192
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    keep_best: int = 1
    async_checkpoints: bool = True

    def __post_init__(self) -> None:
        settle(self, "train")
        _check_ranges(self)
        devices.check_name(self.device, "train.device")
        if self.warmup_steps == -1:
            object.__setattr__(self, "warmup_steps", min(MOST_WARMUP_STEPS, self.steps // 10))
        _check_schedule(self)
        _check_balance(self)

    @property
    def tokens_per_step(self) -> int:
        """Targets of one optimizer step, over all its micro-batches."""
        return self.micro_batches * self.batch_size * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which text, in what shares, and what is to be learnt of it.

    task: "causal" (each token from those before it); for encoder-decoders "span_corruption" (what was taken out of a
    text, as T5 does it: the part `noise_density` of its tokens, in spans of `mean_span_length` tokens on average), or
    "translation" (of pairs of texts; then domains are directions, such as "en-fr").
    weights: "proportional" to tokens, "uniform", or domain -> weight (domains not named get none).
    epochs: domain -> how many times the whole run passes over it, instead of weights.
    document_attention: whether a token sees only its own document; otherwise its whole window (always, where an encoder
    reads it).
    """

    task: Literal["causal", "span_corruption", "translation"] = "causal"
    noise_density: float = 0.15
    mean_span_length: float = 3.0

    weights: Literal["proportional", "uniform"] | dict[str, float] = "proportional"
    epochs: dict[str, float] | None = None
    document_attention: bool = True

    def __post_init__(self) -> None:
        settle(self, "data")
        if not 0 < self.noise_density < 1:
            raise ConfigError(f"data.noise_density={self.noise_density}; it must be above 0 and below 1")
        if self.mean_span_length < 1:
            raise ConfigError(f"data.mean_span_length={self.mean_span_length}; use 1 or more")
        if self.epochs is not None and self.weights != "proportional":
            raise ConfigError(
                f"data.weights={self.weights!r} and data.epochs={self.epochs!r} both say how much of each domain is "
                "seen; leave one of them out"
            )
        for name, shares in (("weights", self.weights), ("epochs", self.epochs)):
            if isinstance(shares, dict):
                _check_shares(name, shares)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train and how. `model` is a Hugging Face configuration (model_type and its fields); the vocabulary size
    and the special ids may be left to the tokenizer, whose size `vocab_size` then sets."""

    model: dict[str, Any]
    vocab_size: int = 4096
    train: TrainSettings = field(default_factory=TrainSettings)
    data: DataSettings = field(default_factory=DataSettings)

    def __post_init__(self) -> None:
        settle(self, "")
        if self.vocab_size < 1:
            raise ConfigError(f"vocab_size={self.vocab_size}; use 1 or more")
        for name, value in self.model.items():
            _check_json(f"model.{name}", value)

    def model_config(self, vocab_size: int, eos_token_id: int | None) -> ModelConfig:
        """The description of the model, with the tokenizer's sizes filled in where the recipe leaves them open.

        Raises ConfigError for a model that cannot be, or that cannot be trained by these settings.
        """
        own = {"vocab_size": vocab_size, "eos_token_id": eos_token_id}
        hf = {**own, "bos_token_id": None, **self.model}
        if isinstance(hf["vocab_size"], int) and hf["vocab_size"] < vocab_size:
            raise ConfigError(
                f"model.vocab_size={hf['vocab_size']} is smaller than the tokenizer's {vocab_size}; "
                "raise it or leave it out"
            )
        hf.setdefault("max_position_embeddings", 4 * self.train.sequence_length)
        if "model_type" not in hf:
            raise ConfigError('a recipe without model.model_type; for example model_type = "qwen3_moe"')
        config = family(hf["model_type"]).from_hf(hf)
        if config.encoder is not None and "decoder_start_token_id" not in self.model:
            config = dataclasses.replace(config, decoder_start_token_id=eos_token_id)
        if self.train.sequence_length > config.context_length:
            raise ConfigError(
                f"train.sequence_length={self.train.sequence_length} is more than "
                f"model.max_position_embeddings={config.context_length}; shorten the one or raise the other"
            )
        refuse_unfit_task(self.data, config)
        _refuse_unfit_balance(self.train, config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready tree, which `from_dict` reads."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Recipe":
        """The inverse of `to_dict`; what is left out takes its default. Raises ConfigError for unknown fields."""
        refuse_unknown("the recipe", tree, names_of(cls))
        if "model" not in tree:
            raise ConfigError("a recipe without a [model] table; give at least model_type and hidden_size")
        parts = dict(tree)
        for name, kind in (("train", TrainSettings), ("data", DataSettings)):
            table = tree.get(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{name}={table!r}; it must be a table of settings, [{name}]")
            refuse_unknown(name, table, names_of(kind))
            parts[name] = kind(**table)
        return cls(**parts)

    @classmethod
    def from_toml(cls, path: Path, overrides: list[str]) -> "Recipe":
        """Read a TOML file, then apply `table.field=value` overrides (values in TOML or plain words)."""
        return cls.from_dict(apply_overrides(read_toml(path), overrides))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a tree. Raises ConfigError when it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from error
    except ValueError as error:  # of TOML, of UTF-8, or of a number with thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `tree` with `table.field=value` settings put in."""
    return with_values(tree, parse_overrides(overrides))


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """{"table.field": value} of "table.field=value" settings; of two for one field the last one counts."""
    return dict(parse_override(override) for override in overrides)


def with_values(tree: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `tree` with {"table.field": value} put in, in order."""
    for path, value in values.items():
        tree = with_value(tree, path, value)
    return tree


def parse_override(override: str) -> tuple[str, Any]:
    """("table.field", value) from "table.field=value". Raises ConfigError for anything else."""
    path, separator, text = override.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"--set {override!r}; write table.field=value, for example train.learning_rate=3e-4")
    return path.strip(), parse_value(text.strip())


def with_value(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `tree` in which the field `table.field` is `value`. Raises ConfigError where a value is no table."""
    name, _, rest = path.partition(".")
    if not rest:
        return {**tree, name: value}
    inner = tree.get(name, {})
    if not isinstance(inner, dict):
        raise ConfigError(f"{path!r}: {name!r} is a value, not a table; write table.field=value")
    return {**tree, name: with_value(inner, rest, value)}


def parse_value(text: str) -> Any:
    """A value as TOML writes it; anything else is plain words."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # no TOML, or a number with thousands of digits
        return text


_AT_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "sequence_length": 1,
    "micro_batches": 1,
    "warmup_steps": -1,
    "weight_decay": 0,
    "seed": 0,
    "evaluate_every": 1,
    "evaluate_tokens": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "keep_best": 0,
}
_AT_MOST = {"seed": 2**63 - 1}
_ABOVE_ZERO = ("learning_rate", "clip_norm")
_MOST_SHARE = 1e100
_FRACTIONS = ("ema_decay", "muon_momentum")


def _check_ranges(settings: TrainSettings) -> None:
    for name, least in _AT_LEAST.items():
        if getattr(settings, name) < least:
            raise ConfigError(f"train.{name}={getattr(settings, name)}; use {least} or more")
    for name, most in _AT_MOST.items():
        if getattr(settings, name) > most:
            raise ConfigError(f"train.{name}={getattr(settings, name)}; use {most} or less")
    for name in _ABOVE_ZERO:
        if getattr(settings, name) <= 0:
            raise ConfigError(f"train.{name}={getattr(settings, name)}; it must be above 0")
    for name in _FRACTIONS:
        if not 0 <= getattr(settings, name) < 1:
            raise ConfigError(f"train.{name}={getattr(settings, name)}; it must be at least 0 and below 1")
    if not all(0 <= beta < 1 for beta in settings.betas):
        raise ConfigError(f"train.betas={list(settings.betas)}; both must be at least 0 and below 1")
    if not 0 <= settings.final_fraction <= 1:
        raise ConfigError(f"train.final_fraction={settings.final_fraction}; it must be between 0 and 1")
    if not 0 < settings.decay_fraction <= 1:
        raise ConfigError(f"train.decay_fraction={settings.decay_fraction}; it must be above 0 and at most 1")


def _check_schedule(settings: TrainSettings) -> None:
    steps, warmup = settings.steps, settings.warmup_steps
    if warmup and warmup >= steps:
        raise ConfigError(f"train.warmup_steps={warmup} leaves nothing of train.steps={steps}; use 0 to {steps - 1}")
    decay = math.ceil(settings.decay_fraction * steps)
    if settings.schedule == "wsd" and warmup + decay > steps:
        raise ConfigError(
            f"train.warmup_steps={warmup} and the decay over train.decay_fraction={settings.decay_fraction} of "
            f"train.steps={steps} ({decay} steps) overlap; together they may take {steps} steps"
        )


def _check_balance(settings: TrainSettings) -> None:
    from moesaic.routing.balancers import BALANCE_LOSSES  # late, for it loads torch

    names = [name for name, _ in settings.balance_losses]
    for name, coefficient in settings.balance_losses:
        BALANCE_LOSSES[name]  # raises for an unknown name
        if names.count(name) > 1:
            raise ConfigError(f"train.balance_losses names {name!r} twice; give one coefficient, or points over steps")
        _check_scheduled(f"train.balance_losses: {name!r}", coefficient)
    _check_scheduled("train.selection_bias_rate", settings.selection_bias_rate)
    _check_scheduled("train.mtp_coefficient", settings.mtp_coefficient)


def refuse_unfit_task(data: DataSettings, config: ModelConfig) -> None:
    """Raise ConfigError where the task is for another kind of model."""
    has_encoder, wants_encoder = config.encoder is not None, data.task != "causal"
    if has_encoder and not wants_encoder:
        raise ConfigError(
            f"data.task={data.task!r} is for decoders and {config.family} has an encoder; "
            "set data.task to 'span_corruption' or 'translation'"
        )
    if wants_encoder and not has_encoder:
        raise ConfigError(
            f"data.task={data.task!r} needs an encoder-decoder and {config.family} has no encoder; "
            "use data.task='causal', or model.model_type='switch_transformers' or 'nllb-moe'"
        )


def _refuse_unfit_balance(settings: TrainSettings, config: ModelConfig) -> None:
    from moesaic.routing.balancers import refuse_unfit  # late, for it loads torch

    parts = [layer.feed_forward for layer in config.every_layer]
    routers = [part.router for part in parts if isinstance(part, MoeConfig)]
    refuse_unfit((name for name, _ in settings.balance_losses), routers)


def _check_scheduled(where: str, value: Scheduled) -> None:
    points = value if isinstance(value, tuple) else ((0, value),)
    steps = [step for step, _ in points]
    if not points:
        raise ConfigError(f"{where} has no points; give a number, or [[step, value], ...]")
    if steps[0] < 0 or steps != sorted(set(steps)):
        raise ConfigError(f"{where} has points at steps {steps}; they must be 0 or more and increase")
    least = min(number for _, number in points)
    if least < 0:
        raise ConfigError(f"{where} has the value {least}; use 0 or more")


def _check_json(where: str, value: Any) -> None:
    """The model's description is kept as JSON, which has no dates and no infinity."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{where}={shown(value)}; it must be a finite number, a text, true or false, or a list or table of these"
        ) from None


def _check_shares(name: str, shares: Mapping[str, float]) -> None:
    for domain, share in shares.items():
        if share < 0:
            raise ConfigError(f"data.{name}: {domain!r} has {share}; use 0 or more")
        if share > _MOST_SHARE:
            raise ConfigError(f"data.{name}: {domain!r} has {share}; use {_MOST_SHARE:g} or less")
    if not any(shares.values()):
        raise ConfigError(f"data.{name}={dict(shares)!r} gives no domain anything; give one a number above 0")
