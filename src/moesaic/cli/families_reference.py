"""Writes docs/families.md from the families themselves: `python -m moesaic.cli.families_reference > docs/families.md`.

What a family is stands in the first line of its file; which files it has is asked of the code that reads and writes
them.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from moesaic import families
from moesaic.cli import output
from moesaic.config import ModelConfig
from moesaic.errors import CheckpointError, ConfigError
from moesaic.families import _counted
from moesaic.families._common import Preset
from moesaic.families._published import PUBLISHED
from moesaic.hub import gguf
from moesaic.hub.layouts import fused
from moesaic.hub.quantization import Format
from moesaic.hub.safetensors_header import TensorHeader
from moesaic.hub.sources import GgufWeights
from moesaic.hub.targets import Plan
from moesaic.models.weight_map import WeightMap, file_shapes

COMMAND = "python -m moesaic.cli.families_reference > docs/families.md"

_INTRODUCTION = """\
A family is what Hugging Face calls a `model_type`: one file of data in [families](../src/moesaic/families) that reads
and writes config.json and names the tensors. Saved files are what the Hub holds, and transformers loads them."""

_FILES = """\
Any of them is read and written in fp32, bf16 and fp16, in files of any size (`moesaic convert`). *Experts*: "one by
one" as released, or stacked as in transformers 5 (`--layout fused`), or stacked alone, where the released files are.
*Packed*: number formats of 8 and 4 bits (`--dtype`). *GGUF*: what llama.cpp calls the architectures that are read."""

_ORACLE = """\
Each is held against transformers 5.23's own model of it (the class named here) in tiny random configurations, four or
more: logits within 1e-5 of their scale, padded left and right, and token by token with the cache; every chosen expert;
gradients within 1e-4; files byte for byte both ways (`tests/families`). Where transformers differs from the authors, an
independent reference of the authors' equations stands in: [LOG.md](../LOG.md) says where."""

_COUNTS = """\
Counted by `moesaic count`, which names its rules; published are the makers' own figures, who follow no common rule."""

_COUNTED = """\
Hybrids with state-space or linear attention layers, and a few others: `moesaic count` and `moesaic plan` take their
configurations, and loading one says that it does not run yet. Known `model_type`s: {architectures}."""

# What a family without presets is shown by.
_EXAMPLES: dict[str, dict[str, Any]] = {
    "granitemoeshared": families.presets()["granite-3.0-1b-a400m"].config | {"shared_intermediate_size": 512},
    "moesaic": {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}


def reference() -> str:
    """The whole page, Markdown."""
    runs = [(name, family_rows(name)) for name in families.names()]
    parts = [
        "# Families",
        f"<!-- Written by `{COMMAND}`; do not edit. -->",
        _INTRODUCTION,
        _table(["family", "what it is", "also read as"], (rows[0] for _, rows in runs)),
        "## Files",
        _FILES,
        _table(["family", "experts", "packed", "GGUF", "left out of its files"], (rows[1] for _, rows in runs)),
        "## What they are held against",
        _ORACLE,
        _table(["family", "oracle"], (rows[2] for _, rows in runs)),
        "## Presets",
        _COUNTS,
        _table(_PRESET_COLUMNS, _preset_rows(families.presets())),
        "## Counted and planned only",
        _COUNTED.format(architectures=", ".join(f"`{name}`" for name in sorted(_counted.ARCHITECTURES))),
        _table(_PRESET_COLUMNS, _preset_rows(_counted.PRESETS)),
    ]
    return "\n\n".join(parts) + "\n"


def family_rows(name: str) -> tuple[list[str], list[str], list[str]]:
    """A family's rows: what it is, its files, its oracle."""
    family, config = families.family(name), _example(name)
    aliases = ", ".join(f"`{alias}`" for alias in getattr(family, "ALIASES", ()))
    what = (family.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    left_out = ", ".join(f"`{part}*`" for part in families.text_names(name)[1]) or "-"
    architectures = ", ".join(f"`{each}`" for each, means in gguf.ARCHITECTURES.items() if name in means[:2]) or "-"
    oracle = "none: references of our own" if name == "moesaic" else f"`{families.to_hf(config)['architectures'][0]}`"
    files = [_experts(config), ", ".join(_packed(config)) or "-", architectures, left_out]
    return [f"`{name}`", what, aliases or "-"], [f"`{name}`", *files], [f"`{name}`", oracle]


def _example(name: str) -> ModelConfig:
    """A model of the family: one layer of it, with experts where it has some."""
    presets = families.family(name).PRESETS
    raw = next(iter(presets.values())).config if presets else _EXAMPLES[name] | {"model_type": name}
    config = families.from_hf(raw)
    if config.encoder:
        return config
    layer = config.layers[config.moe_layers[0] if config.moe_layers else 0]
    return replace(config, decoder=replace(config.decoder, layers=(layer,)), mtp=())


def _experts(config: ModelConfig) -> str:
    if not config.moe_layers:
        return "dense"
    weight_map = families.family(config.family).weight_map(config)
    if fused(weight_map):
        return "one by one, stacked"
    down = next(pieces for name, pieces in weight_map.items() if name.endswith(".experts.down"))
    return "one by one" if len({piece.name for piece in down}) > 1 else "stacked"


def _packed(config: ModelConfig) -> Iterator[str]:
    """The packed formats that a conversion of this model could write."""
    for format_ in ("fp8", "mxfp4"):
        try:
            Plan(cast("GgufWeights", _Shapes(config)), cast("Format", format_))
        except (ConfigError, CheckpointError):
            continue
        yield format_


class _Shapes:
    """Weights of which nothing but names and shapes is there."""

    where = Path("shapes")

    def __init__(self, config: ModelConfig) -> None:
        self.config, self._map = config, families.family(config.family).weight_map(config)
        whole = {spec.name for spec in config.tensors() if spec.dtype == "int32"}
        dtypes = {piece.name: "I32" for name in whole for piece in self._map[name]}
        shapes = file_shapes(config.tensors(), self._map)
        self.tensors = {
            name: TensorHeader(dtypes.get(name, "BF16"), shape, self.where) for name, shape in shapes.items()
        }

    def weight_map(self) -> WeightMap:
        return self._map


_PRESET_COLUMNS = ("preset", "family", "total", "active_gemm", "active_all", "published", "licence", "source")


def _preset_rows(presets: Mapping[str, Preset]) -> Iterator[list[str]]:
    for name, preset in presets.items():
        model = _counted.count(preset.config) if _counted.knows(preset.config) else families.find_preset(name)
        counts = [output.number(count) for count in (model.total, model.active_gemm, model.active_all)]
        said = " / ".join(part for part in PUBLISHED.get(name, ()) if part) or "-"
        unverified = "" if preset.is_verified else " (sizes unverified)"
        yield [f"`{name}`{unverified}", f"`{model.family}`", *counts, said, preset.licence, preset.source]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(reference())
