"""Where a program's weights come from: files, read as they are packed, or a model that is in memory already.

E experts.
"""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.hub import checkpoint
from moesaic.hub.codes import CodedTensor, CodedValues, Codes
from moesaic.hub.parts import Box, box_shape, whole
from moesaic.hub.sources import GgufWeights, SafetensorsFolder
from moesaic.hub.stored import DTYPES, known_dtype
from moesaic.hub.tables import check_table
from moesaic.hub.values import Values
from moesaic.models.base import LanguageModel
from moesaic.models.init import hash_routers
from moesaic.tensor_spec import TensorSpec


class Weights(Protocol):
    """A model's tensors by their name in it (`ModelConfig.tensors`)."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def dtype(self) -> torch.dtype:
        """That of the embedding, which most others have, too."""
        ...

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """The tensor, or what one expert has of it, in its own dtype."""
        ...

    def coded(self, name: str) -> CodedTensor | None:
        """The tensor by its codes, where it is packed in a format that kernels multiply; else None."""
        ...


class ModelWeights:
    """The tensors of a model that is in memory."""

    def __init__(self, model: LanguageModel) -> None:
        self.config = model.config
        self._tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    @property
    def dtype(self) -> torch.dtype:
        return self._tensors["embedding.weight"].dtype

    def read(self, name: str, expert: int | None = None) -> Tensor:
        return self._tensors[name] if expert is None else self._tensors[name][expert]

    def coded(self, name: str) -> CodedTensor | None:
        return None


class FileWeights:
    """The tensors of files, each read when it is asked for.

    Raises CheckpointError for tensors that are missing, or that the configuration does not describe.
    """

    def __init__(self, source: SafetensorsFolder | GgufWeights) -> None:
        self.config = source.config
        weight_map = source.weight_map()
        checkpoint.check_tensors(source.config, weight_map, source.tensors, source.where, allow_extra=False)
        self._source, self._pieces = source, weight_map
        self._values = Values(source, weight_map)
        view = source.coded() if isinstance(source, SafetensorsFolder) else None
        self._coded = None if view is None else CodedValues(view, weight_map)
        self._specs = {spec.name: spec for spec in source.config.tensors()}
        self._tables = hash_routers(source.config)
        self.where = source.where

    @property
    def files(self) -> list[Path]:
        """Those that the tensors are in."""
        if isinstance(self._source, GgufWeights):
            return [self.where]
        return sorted({header.file for header in self._source.stored.tensors.values()})

    @property
    def even_bits(self) -> set[int]:
        """Of the whole numbers that the files hold."""
        source = self._source
        packed = source.quantization if isinstance(source, SafetensorsFolder) else None
        return {group.bits for group in packed.groups} if packed else set()

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype("embedding.weight")

    def read(self, name: str, expert: int | None = None) -> Tensor:
        spec = self._specs[name]
        box = _box(spec, expert)
        out = torch.empty(box_shape(box), dtype=self._dtype(name))
        self._values.read_into(out, spec, box)
        if name in self._tables:
            check_table(out, self._tables[name], f"{self._pieces[name][0].name} in {self._source.where}")
        return out if expert is None else out[0]

    def coded(self, name: str) -> CodedTensor | None:
        spec, values = self._specs[name], self._coded
        coding = None if values is None else values.coding(spec)
        if values is None or coding is None:
            return None

        def read(expert: int | None) -> Codes:
            found = values.read(spec, coding, _box(spec, expert))
            return found if expert is None else Codes(found.values[0], found.scales[0])

        return CodedTensor(coding.format, read)

    def _dtype(self, name: str) -> torch.dtype:
        spec = self._specs[name]
        if spec.dtype is not None:
            return torch.float32 if spec.dtype == "float32" else torch.int32
        kinds = {known_dtype(piece.name, self._source.tensors[piece.name], DTYPES) for piece in self._pieces[name]}
        return max(kinds, key=lambda kind: (kind.itemsize, kind == torch.bfloat16))


def _box(spec: TensorSpec, expert: int | None) -> Box:
    """Of all of a tensor, or of one expert."""
    box = whole(spec.shape)
    return box if expert is None else ((expert, expert + 1), *box[1:])
