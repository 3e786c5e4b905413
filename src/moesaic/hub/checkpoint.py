"""A local folder in the Hugging Face layout, opened without torch: its configuration and what tensors it holds."""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.errors import CheckpointError, ConfigError
from moesaic.families import _multimodal
from moesaic.hub.quantization import FIELD, Quantization, read_quantization
from moesaic.hub.safetensors_header import TensorHeader, read_header
from moesaic.models.weight_map import WeightMap, file_shapes

CONFIG = "config.json"
GENERATION = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_EXPERT = re.compile(r"(?:^|\.)layers\.(\d+)\..*\bexperts\.(\d+)\.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it cannot be read or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object; copy or download it again")
    return value


def read_config_file(path: Path) -> ModelConfig:
    """A config.json as our description; a generation_config.json beside it has the last word on token ids."""
    raw = read_json(path)
    if path.with_name(GENERATION).is_file():
        raw |= _token_ids(read_json(path.with_name(GENERATION)))
    try:
        if read_quantization(raw):  # how files are packed, which is no part of the model
            raw.pop(FIELD)
        return families.from_hf(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def tell_left_out(path: Path) -> None:
    """Say on stderr which parts of a config.json are not read, where it describes more than text."""
    if _multimodal.has_text_part(raw := read_json(path)):
        print(f"moesaic: {path}: {_multimodal.left_out(raw)}", file=sys.stderr)


def read_folder_quantization(folder: Path) -> Quantization | None:
    """How the weights in `folder` are packed. Raises ConfigError for a way that is not known."""
    try:
        return read_quantization(read_json(folder / CONFIG))
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from error


def _token_ids(generation: dict[str, Any]) -> dict[str, Any]:
    """Chat models often name further end tokens only in generation_config.json."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return {name: generation[name] for name in names if generation.get(name) is not None}


def read_folder_config(folder: Path) -> ModelConfig:
    """The description of the model in `folder`."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"no {CONFIG} in {folder}; give a folder that holds a model in the Hugging Face layout")
    return read_config_file(folder / CONFIG)


def read_tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of the folder's safetensors files, by name.

    Raises CheckpointError when there are none, when the index names absent files or tensors, or when one is damaged.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to files; copy or download it again")
    shards = sorted(set(index.values()))
    absent = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
    if absent:
        raise CheckpointError(f"{folder / INDEX} names {some(absent)}, absent from the folder; copy them there")
    tensors = {name: tensor for shard in shards for name, tensor in read_header(folder / shard).items()}
    lost = sorted(index.keys() - tensors.keys())
    if lost:
        raise CheckpointError(f"{folder / INDEX} names tensors that its files lack: {some(lost)}; copy the files again")
    return tensors


def text_part(tensors: Mapping[str, TensorHeader], family: str, where: Path) -> dict[str, TensorHeader]:
    """Of a model's tensors those that its family reads: the text part of a model for images and text, say.

    They have the names that they have in released text models. Says on stderr what is left out. Raises CheckpointError
    for two tensors of one name.
    """
    prefix, others = families.text_names(family)
    left_out = [name for name in tensors if name.startswith(others)]
    if left_out:
        parts = some(sorted(part.rstrip("._") for part in others if any(name.startswith(part) for name in left_out)))
        rest = ", the text part is read" if prefix else ""
        print(f"moesaic: {where}: {len(left_out)} tensors ({parts}) are left out{rest}", file=sys.stderr)
    own = {name.removeprefix(prefix): at for name, at in tensors.items() if not name.startswith(others)}
    found: dict[str, TensorHeader] = {}
    for name, at in own.items():
        released = families.released_name(family, name)
        if released in found:
            raise CheckpointError(f"{where} holds {released} under two names, one of them {name}; remove one")
        found[released] = at
    return found


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder} holds its weights as pickles ({some(pickles)}), which can run code when opened and are never "
            "read; convert them to safetensors with the library that wrote them"
        )
    return CheckpointError(f"no {SINGLE} and no {INDEX} in {folder}; put the weights beside {CONFIG}")


def check_tensors(
    config: ModelConfig,
    weight_map: WeightMap,
    found: Mapping[str, TensorHeader],
    where: Path,
    *,
    allow_extra: bool = False,
) -> list[str]:
    """The names in `found` that `config` does not describe, and that are left out.

    Raises CheckpointError unless all others are there in the right shapes, and where something is left out that does
    not follow from the rest, unless that is allowed.
    """
    expected = file_shapes(config.tensors(), weight_map)
    for name, shape in expected.items():
        if name in found and found[name].shape != shape:
            raise CheckpointError(
                f"{name} in {found[name].file} is {list(found[name].shape)} and its configuration describes "
                f"{list(shape)}; the two do not belong together"
            )
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{where} lacks {len(missing)} of {len(expected)} tensors that its configuration describes: "
            f"{_experts(missing) or some(missing)}; correct the configuration or copy the weights again"
        )
    extra = [name for name in found if name not in expected]
    unexplained = [name for name in extra if not _is_harmless(name, config)]
    if unexplained and not allow_extra:
        raise CheckpointError(
            f"{where} holds {len(unexplained)} tensors that its configuration does not describe: {some(unexplained)}; "
            "correct the configuration (layers, experts, biases) or remove them, or leave them out with "
            "`moesaic convert --allow-extra` or load(..., allow_extra=True)"
        )
    return extra


def _experts(names: list[str]) -> str:
    """Names of one expert's tensors each as experts of layers; nothing where others are among them."""
    matches = [_EXPERT.search(name) for name in names]
    if not all(matches):
        return ""
    layers: dict[str, list[str]] = {}
    for match in matches:
        if match and match[2] not in layers.setdefault(match[1], []):
            layers[match[1]].append(match[2])
    return some(
        f"expert{'s' if len(experts) > 1 else ''} {some(sorted(experts, key=int), 8)} of layer {layer}"
        for layer, experts in layers.items()
    )


def _is_harmless(name: str, config: ModelConfig) -> bool:
    """Tables that follow from the configuration, and other names of a tied table."""
    of_stack = config.encoder is not None and name.endswith("embed_tokens.weight")
    is_other_name = config.tie_word_embeddings and (name == "lm_head.weight" or of_stack)
    return name.endswith("rotary_emb.inv_freq") or is_other_name


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first few of these in the words of a message."""
    listed = list(names)
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest
