"""Weights in: the model is built on the meta device, then each tensor is filled piece by piece from lazy reads."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.errors import CheckpointError
from moesaic.hub import checkpoint
from moesaic.hub.gguf import GgufFile
from moesaic.hub.resolve import Place, weights_place
from moesaic.hub.safetensors_header import TensorHeader
from moesaic.models.decoder import Decoder
from moesaic.models.weight_map import Piece, WeightMap
from moesaic.tensor_spec import TensorSpec

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32}
_FIXED = {"float32": torch.float32, "int32": torch.int32}


class WeightSource(Protocol):
    """Tensors by name, read one at a time: `where` they are for messages, what there is, and how to get one."""

    @property
    def where(self) -> Path: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def tensors(self) -> Mapping[str, TensorHeader]: ...
    def weight_map(self) -> WeightMap: ...
    def read(self, name: str) -> Tensor: ...


class SafetensorsFolder:
    """A folder of safetensors files; a file is opened when the first of its tensors is asked for."""

    def __init__(self, folder: Path) -> None:
        self.where = folder
        self.config = checkpoint.read_folder_config(folder)
        self.tensors = checkpoint.read_tensor_headers(folder)
        self._files: dict[Path, Any] = {}

    def weight_map(self) -> WeightMap:
        return families.family(self.config.family).weight_map(self.config)

    def read(self, name: str) -> Tensor:
        path = self.tensors[name].file
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
            return self._files[path].get_slice(name)[...]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name} from {path} ({error}); copy or download it again") from error


class GgufWeights:
    """A GGUF file; every tensor comes as fp32."""

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        self.where, self.config, self.tensors = path, self._file.config, self._file.tensors

    def weight_map(self) -> WeightMap:
        return self._file.weight_map()

    def read(self, name: str) -> Tensor:
        return torch.from_numpy(self._file.read(name))


def open_source(place: Place) -> WeightSource:
    """The weights at a place that has some."""
    return GgufWeights(place.path) if place.kind == "gguf" else SafetensorsFolder(place.path)


def load(
    path_or_preset: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Decoder:
    """A model from a folder (config.json and safetensors), a .gguf file, or a preset that brings its weights.

    It is in evaluation mode. dtype: None keeps every tensor's own (fp32 from GGUF). What a router does not learn by
    gradient keeps its own dtype whatever is asked: fp32 selection biases, int32 hash tables.
    Raises CheckpointError for files that are missing, damaged or at odds with their configuration, ConfigError for a
    model that cannot be expressed, MissingDependencyError for a preset whose package is not installed.
    """
    source = open_source(weights_place(path_or_preset))
    weight_map = source.weight_map()
    checkpoint.check_tensors(source.config, weight_map, source.tensors, source.where)
    state = {spec.name: _filled(spec, weight_map[spec.name], source, dtype, device) for spec in source.config.tensors()}
    model = Decoder(source.config, device="meta")
    model.load_state_dict(state, assign=True)
    return model.eval()  # routers may draw noise, and experts have limits, while training


def _filled(
    spec: TensorSpec, pieces: tuple[Piece, ...], source: WeightSource, dtype: torch.dtype | None, device: Any
) -> Tensor:
    """Our tensor, made of its pieces; beside it only one piece is in memory at a time."""
    headers = [source.tensors[piece.name] for piece in pieces]
    own = _own_dtype(headers, pieces, _INTEGERS if spec.dtype == "int32" else DTYPES)
    wanted = dtype or own if spec.dtype is None else _FIXED[spec.dtype]
    tensor = torch.empty(spec.shape, dtype=wanted, device=device)
    for piece in pieces:
        tensor[piece.index].copy_(source.read(piece.name))
    return tensor


def _own_dtype(headers: list[TensorHeader], pieces: tuple[Piece, ...], known: dict[str, torch.dtype]) -> torch.dtype:
    for header, piece in zip(headers, pieces, strict=True):
        if header.dtype not in known:
            raise CheckpointError(
                f"{piece.name} in {header.file} is of type {header.dtype}; known: {', '.join(known)}. "
                "Use an unquantized checkpoint"
            )
    kinds = {header.dtype for header in headers}
    # Experts of one layer in different precisions: the widest holds them all.
    return max((known[kind] for kind in kinds), key=lambda kind: (kind.itemsize, kind == torch.bfloat16))
