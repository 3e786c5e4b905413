"""Weights out: the map that loads a family's files, read backwards."""

import json
import math
import os
import re
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.errors import CheckpointError
from moesaic.hub import checkpoint
from moesaic.hub.safetensors_header import header_bytes
from moesaic.hub.staging import replaced_folder
from moesaic.hub.stored import SPELLINGS
from moesaic.models.base import LanguageModel
from moesaic.models.weight_map import Index, file_shapes

_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


class SavesItself(Protocol):
    """A tokenizer, or anything else that writes its files to a folder."""

    def save(self, folder: Path, /) -> Any: ...


class _HasBytes(Protocol):
    @property
    def num_bytes(self) -> int: ...


T = TypeVar("T", bound=_HasBytes)


class _Part(NamedTuple):
    """Where a view of one of the model's tensors stands in a tensor of a file."""

    at: Index
    values: Tensor


class _FileTensor(NamedTuple):
    """A tensor as the file will hold it: views of the model's, so nothing is copied before it is written."""

    name: str
    shape: tuple[int, ...]
    parts: list[_Part]

    @property
    def dtype(self) -> torch.dtype:
        """One that holds all its parts."""
        return reduce(torch.promote_types, (part.values.dtype for part in self.parts))

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def values(self) -> Tensor:
        """The whole of it, contiguous, on the CPU."""
        if len(self.parts) == 1:
            return self.parts[0].values.detach().to("cpu").contiguous()
        whole = torch.empty(self.shape, dtype=self.dtype)
        for part in self.parts:
            whole[part.at] = part.values.detach().to("cpu", self.dtype)
        return whole


def save(
    model: LanguageModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: SavesItself | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the model as its family's config.json, generation_config.json and safetensors, and a tokenizer if given.

    A checkpoint that is already there is replaced only when the new one is complete and on disk; other files in the
    folder stay. Raises ConfigError when the family cannot express the model, CheckpointError when the disk says no.
    """
    with replaced_folder(Path(folder), is_weight_file) as new:
        write_checkpoint(model, new, max_shard_bytes=max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(new)


def is_weight_file(name: str) -> bool:
    """Whether a file of this name holds or lists weights, and must not outlive them."""
    return _WEIGHT_FILE.fullmatch(name) is not None


def write_checkpoint(model: LanguageModel, folder: Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write the files of a model into an empty folder."""
    config = model.config
    described = families.to_hf(config)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    # transformers 5 reads `dtype`, other readers `torch_dtype`.
    write_json(folder / checkpoint.CONFIG, described | {"dtype": dtype, "torch_dtype": dtype})
    write_json(folder / checkpoint.GENERATION, generation_fields(config, described))
    shards = in_shards(_file_tensors(model), max_shard_bytes)
    index: dict[str, str] = {}
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        _write_safetensors(folder / name, shard)
        index |= {tensor.name: name for tensor in shard}
    if len(shards) == 1:
        return
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    write_json(folder / checkpoint.INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def generation_fields(config: ModelConfig, described: dict[str, Any]) -> dict[str, Any]:
    """What a generation_config.json repeats of a config.json."""
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return {"_from_model_config": True} | {name: described[name] for name in ids if described.get(name) is not None}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file with an object, two spaces a level."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _file_tensors(model: LanguageModel) -> list[_FileTensor]:
    state = model.state_dict()
    weight_map = families.family(model.config.family).weight_map(model.config)
    shapes = file_shapes(model.config.tensors(), weight_map)
    tensors = {name: _FileTensor(name, shape, []) for name, shape in shapes.items()}
    for spec in model.config.tensors():
        if spec.name not in state:
            raise CheckpointError(f"{spec.name} is packed, which files do not hold; save the model before it is packed")
        for piece in weight_map[spec.name]:
            values = state[spec.name][piece.index]
            tensors[piece.name].parts.append(_Part(piece.file_index, values.mT if piece.transposed else values))
    return list(tensors.values())


def in_shards(tensors: list[T], max_shard_bytes: int) -> list[list[T]]:
    """Consecutive tensors up to `max_shard_bytes`; a larger tensor has a shard of its own."""
    shards: list[list[T]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.num_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """The files of so many shards."""
    if count == 1:
        return [checkpoint.SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Any named tensors as one safetensors file, streamed. Raises OSError when the disk says no."""
    _write_safetensors(
        path, [_FileTensor(name, tuple(each.shape), [_Part((), each)]) for name, each in tensors.items()]
    )


def _write_safetensors(path: Path, tensors: list[_FileTensor]) -> None:
    """Stream tensors to a file, one at a time; the safetensors package would first copy the whole shard in memory.

    Wide types come first, so that every tensor starts on a multiple of its item size.
    """
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    described = {each.name: (SPELLINGS[each.dtype], each.shape) for each in tensors}
    with path.open("wb") as file:
        file.write(header_bytes(described))
        for tensor in tensors:
            file.write(tensor.values().reshape(-1).view(torch.uint8).numpy().data)
