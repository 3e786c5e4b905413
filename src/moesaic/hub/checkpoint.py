"""A local folder in the Hugging Face layout, opened without torch: its configuration and what tensors it holds."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.errors import CheckpointError, ConfigError
from moesaic.hub.safetensors_header import TensorHeader, read_header
from moesaic.models.weight_map import WeightMap, file_shapes

CONFIG = "config.json"
GENERATION = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


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
        return families.from_hf(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _token_ids(generation: dict[str, Any]) -> dict[str, Any]:
    """Chat models often name further end tokens only in generation_config.json."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
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
        raise CheckpointError(f"{folder / INDEX} names {_some(absent)}, absent from the folder; copy them there")
    tensors = {name: tensor for shard in shards for name, tensor in read_header(folder / shard).items()}
    lost = sorted(index.keys() - tensors.keys())
    if lost:
        raise CheckpointError(
            f"{folder / INDEX} names tensors that its files lack: {_some(lost)}; copy the files again"
        )
    return tensors


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder} holds its weights as pickles ({_some(pickles)}), which can run code when opened and are never "
            "read; convert them to safetensors with the library that wrote them"
        )
    return CheckpointError(f"no {SINGLE} and no {INDEX} in {folder}; put the weights beside {CONFIG}")


def check_tensors(config: ModelConfig, weight_map: WeightMap, found: Mapping[str, TensorHeader], where: Path) -> None:
    """Raise CheckpointError unless `found` are exactly the tensors that `config` describes, in the right shapes."""
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
            f"{_some(missing)}; correct the configuration or copy the weights again"
        )
    extra = [name for name in found if name not in expected and not _is_harmless(name, config)]
    if extra:
        raise CheckpointError(
            f"{where} holds {len(extra)} tensors that its configuration does not describe: {_some(extra)}; "
            "correct the configuration (layers, experts, biases) or remove them"
        )


def _is_harmless(name: str, config: ModelConfig) -> bool:
    """Tables that follow from the configuration, and the second name of a tied head."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def _some(names: Iterable[str], limit: int = 4) -> str:
    listed = list(names)
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest
