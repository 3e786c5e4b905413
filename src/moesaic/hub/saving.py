"""Weights out: the map that loads a family's files, read backwards."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.hub import checkpoint
from moesaic.hub.loading import DTYPES
from moesaic.hub.safetensors_header import header_bytes
from moesaic.hub.staging import replaced_folder
from moesaic.models.decoder import Decoder

_SPELLINGS = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


class SavesItself(Protocol):
    """A tokenizer, or anything else that writes its files to a folder."""

    def save(self, folder: Path, /) -> Any: ...


class _FileTensor(NamedTuple):
    """A tensor as the file will hold it: a view of the model's, so nothing is copied before it is written."""

    name: str
    values: Tensor

    @property
    def num_bytes(self) -> int:
        return self.values.numel() * self.values.element_size()


def save(
    model: Decoder,
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


def write_checkpoint(model: Decoder, folder: Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write the files of a model into an empty folder."""
    config = model.config
    described = families.to_hf(config)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    # transformers 5 reads `dtype`, other readers `torch_dtype`.
    write_json(folder / checkpoint.CONFIG, described | {"dtype": dtype, "torch_dtype": dtype})
    write_json(folder / checkpoint.GENERATION, _generation(config, described))
    shards = _shards(list(_file_tensors(model)), max_shard_bytes)
    if len(shards) == 1:
        _write_safetensors(folder / checkpoint.SINGLE, shards[0])
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / name, shard)
        index |= {tensor.name: name for tensor in shard}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    write_json(folder / checkpoint.INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _generation(config: ModelConfig, described: dict[str, Any]) -> dict[str, Any]:
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"_from_model_config": True} | {name: described[name] for name in ids if described[name] is not None}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file with an object, two spaces a level."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _file_tensors(model: Decoder) -> Iterator[_FileTensor]:
    state = model.state_dict()
    weight_map = families.family(model.config.family).weight_map(model.config)
    for spec in model.config.tensors():
        for piece in weight_map[spec.name]:
            yield _FileTensor(piece.name, state[spec.name][piece.index])


def _shards(tensors: list[_FileTensor], max_shard_bytes: int) -> list[list[_FileTensor]]:
    """Consecutive tensors up to `max_shard_bytes`; a larger tensor has a shard of its own."""
    shards: list[list[_FileTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.num_bytes
    return shards


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Any named tensors as one safetensors file, streamed. Raises OSError when the disk says no."""
    _write_safetensors(path, [_FileTensor(name, values) for name, values in tensors.items()])


def _write_safetensors(path: Path, tensors: list[_FileTensor]) -> None:
    """Stream tensors to a file, one at a time; the safetensors package would first copy the whole shard in memory.

    Wide types come first, so that every tensor starts on a multiple of its item size.
    """
    tensors = sorted(tensors, key=lambda tensor: -tensor.values.element_size())
    described = {each.name: (_SPELLINGS[each.values.dtype], tuple(each.values.shape)) for each in tensors}
    with path.open("wb") as file:
        file.write(header_bytes(described))
        for tensor in tensors:
            values = tensor.values.detach().to("cpu").contiguous()
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
