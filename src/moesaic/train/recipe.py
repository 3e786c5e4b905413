"""A recipe: everything that decides a run, as frozen data that reads from TOML and writes to JSON."""

import dataclasses
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.config import ModelConfig
from moesaic.errors import ConfigError
from moesaic.families import family


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. Lengths are in tokens and steps; one step sees micro_batches * batch_size sequences.

    balance_losses: (name of `routing.balancers.BALANCE_LOSSES`, coefficient) pairs, each averaged over layers.
    selection_bias_rate: how far selection biases move a step, for routers that have one.
    """

    steps: int = 1000
    batch_size: int = 16
    sequence_length: int = 256
    micro_batches: int = 1
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    balance_losses: tuple[tuple[str, float], ...] = (("switch", 0.01),)
    selection_bias_rate: float = 0.001
    seed: int = 0
    evaluate_every: int = 100
    evaluate_tokens: int = 8192
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length", "micro_batches", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)}; use 1 or more")
        if self.learning_rate <= 0:
            raise ConfigError(f"train.learning_rate={self.learning_rate}; it must be above 0")
        for name, coefficient in self.balance_losses:
            if coefficient < 0:
                raise ConfigError(f"balance loss {name!r} has coefficient {coefficient}; use 0 or more")

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batches * self.batch_size * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train and how. `model` is a Hugging Face configuration (model_type and its fields); the vocabulary size
    and the special ids may be left to the tokenizer, whose size `vocab_size` then sets."""

    model: dict[str, Any]
    vocab_size: int = 4096
    train: TrainSettings = field(default_factory=TrainSettings)

    def model_config(self, vocab_size: int, eos_token_id: int | None) -> ModelConfig:
        """The description of the model, with the tokenizer's sizes filled in where the recipe leaves them open."""
        hf = {"vocab_size": vocab_size, "eos_token_id": eos_token_id, "bos_token_id": None, **self.model}
        if hf["vocab_size"] < vocab_size:
            raise ConfigError(
                f"model.vocab_size={hf['vocab_size']} is smaller than the tokenizer's {vocab_size}; "
                "raise it or leave it out"
            )
        hf.setdefault("max_position_embeddings", 4 * self.train.sequence_length)
        if "model_type" not in hf:
            raise ConfigError('a recipe without model.model_type; for example model_type = "qwen3_moe"')
        return family(hf["model_type"]).from_hf(hf)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Recipe":
        """The inverse of `to_dict`. Raises ConfigError for fields it does not know."""
        _refuse_unknown("recipe", tree, {"model", "vocab_size", "train"})
        train = dict(tree.get("train", {}))
        _refuse_unknown("train", train, {f.name for f in dataclasses.fields(TrainSettings)})
        for name in ("betas", "balance_losses"):
            if name in train:
                train[name] = tuple(tuple(item) if isinstance(item, list) else item for item in train[name])
        if "model" not in tree:
            raise ConfigError("a recipe without a [model] table; give at least model_type and hidden_size")
        return cls(**{**tree, "train": TrainSettings(**train)})

    @classmethod
    def from_toml(cls, path: Path, overrides: list[str]) -> "Recipe":
        """Read a TOML file, then apply `table.field=value` overrides (values in TOML or plain words)."""
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
        return cls.from_dict(apply_overrides(tree, overrides))


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `tree` with `table.field=value` settings put in."""
    tree = json.loads(json.dumps(tree))
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise ConfigError(f"--set {override!r}; write table.field=value, for example train.learning_rate=3e-4")
        *tables, last = path.strip().split(".")
        place = tree
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {override!r}: {table!r} is a value, not a table")
        place[last] = _parse_value(text.strip())
    return tree


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _refuse_unknown(what: str, tree: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(tree.keys() - known)
    if unknown:
        raise ConfigError(f"unknown field {unknown[0]!r} in {what}; known: {', '.join(sorted(known))}")
