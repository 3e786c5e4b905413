"""Where weights come from: lazy sources of tensors by name, read part by part."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.errors import CheckpointError
from moesaic.hub import checkpoint, layouts
from moesaic.hub.codes import CodedTensors
from moesaic.hub.fp4 import Fp4Groups
from moesaic.hub.fp8 import Fp8Blocks
from moesaic.hub.gguf import GgufFile
from moesaic.hub.mxfp4 import BLOCKS, Mxfp4Tensors
from moesaic.hub.packed import PackedTensors
from moesaic.hub.packed_ints import PACKED, PackedIntTensors
from moesaic.hub.quantization import EXPERTS, FIELD, Quantization
from moesaic.hub.resolve import Place
from moesaic.hub.safetensors_header import TensorHeader
from moesaic.hub.stored import StoredTensors
from moesaic.hub.uneven_files import UnevenTensors
from moesaic.models.weight_map import Index, WeightMap, without_absent_copies


class WeightSource(Protocol):
    """Tensors by name: `where` they are for messages, what there is, how to get one or a part of it.

    is_sliced: a part costs no more than itself, and threads may read at once.
    """

    is_sliced: bool

    @property
    def where(self) -> Path: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def tensors(self) -> Mapping[str, TensorHeader]: ...
    def weight_map(self) -> WeightMap: ...
    def read(self, name: str, index: Index = ()) -> Tensor: ...
    def read_into(self, out: Tensor, name: str, index: Index = ()) -> None: ...


class SafetensorsFolder:
    """A folder of safetensors files, in either layout of experts; packed weights are unpacked as they are read.

    Layers that predict further tokens are part of the model where the files hold them: transformers leaves them out as
    it saves, but not their number in config.json. is_whole: no other parts, such as one for images, are left out.
    Raises CheckpointError or ConfigError for files that are missing, damaged, or packed in a way that is not known.
    """

    is_sliced = True

    def __init__(self, folder: Path) -> None:
        self.where = folder
        config = checkpoint.read_folder_config(folder)
        self.quantization = checkpoint.read_folder_quantization(folder)
        headers = checkpoint.read_tensor_headers(folder)
        text = checkpoint.text_part(headers, config.family, folder)
        self.is_whole = len(text) == len(headers)
        self.stored = StoredTensors(text)
        self.view = _view(self.stored, self.quantization)
        self.tensors: Mapping[str, TensorHeader] = self.view.tensors
        _require_unpacked(self.tensors)
        self.config = _without_absent_mtp(config, self.tensors)

    def weight_map(self) -> WeightMap:
        """The family's, with experts stacked where the files have them so, and the copies that they have."""
        released = families.family(self.config.family).weight_map(self.config)
        return without_absent_copies(layouts.as_stored(released, self.tensors), self.tensors)

    def read(self, name: str, index: Index = ()) -> Tensor:
        return self.view.read(name, index)

    def read_into(self, out: Tensor, name: str, index: Index = ()) -> None:
        self.view.read_into(out, name, index)

    def coded(self) -> CodedTensors | None:
        """The packed weights as they lie in the files, of those packings whose codes kernels multiply."""
        return self.view if isinstance(self.view, PackedTensors | Mxfp4Tensors | UnevenTensors) else None

    def packed(self, name: str) -> tuple[str, ...]:
        """The stored tensors that this one is unpacked from; none where it is stored plainly."""
        return () if isinstance(self.view, StoredTensors) else self.view.companions(name)


def _without_absent_mtp(config: ModelConfig, found: Mapping[str, TensorHeader]) -> ModelConfig:
    released = families.family(config.family).weight_map(config)
    names = {piece.name for ours, pieces in released.items() if ours.startswith("mtp.") for piece in pieces}
    return config if not config.mtp or names & found.keys() else replace(config, mtp=())


_View = StoredTensors | PackedTensors | PackedIntTensors | Mxfp4Tensors | UnevenTensors


def _view(stored: StoredTensors, quantization: Quantization | None) -> _View:
    if quantization is None:
        return stored
    if quantization.method == "compressed-tensors":
        return PackedIntTensors(stored, quantization.unpacked, quantization.groups)
    if quantization.method == "moesaic-uneven4":
        return UnevenTensors(stored, quantization.unpacked)
    if quantization.method == "mxfp4":
        return Mxfp4Tensors(stored, quantization.unpacked)
    if quantization.experts == "fp4":
        return PackedTensors(stored, quantization.unpacked, (Fp8Blocks(), Fp4Groups()))
    in_fours = [f"{name} in {at.file}" for name, at in stored.tensors.items() if at.dtype == Fp4Groups.dtype]
    if in_fours:
        raise CheckpointError(
            f"{in_fours[0]} is of type {Fp4Groups.dtype} and {checkpoint.CONFIG} does not say what that is; add "
            f'"{EXPERTS}": "fp4" to it if these are experts in four bits'
        )
    return PackedTensors(stored, quantization.unpacked, (Fp8Blocks(),))


def _require_unpacked(tensors: Mapping[str, TensorHeader]) -> None:
    """Raise CheckpointError for weights that are packed in another way than their configuration says, or nowhere."""
    packed = {Fp8Blocks.dtype: "", "U8": BLOCKS, "I32": PACKED}
    for name, at in tensors.items():
        if at.dtype in packed and name.endswith(packed[at.dtype]):
            raise CheckpointError(
                f"{name} in {at.file} is of type {at.dtype}, and {checkpoint.CONFIG} does not say how it is packed; "
                f"put the {FIELD} there that came with these files"
            )


class GgufWeights:
    """A GGUF file; every tensor comes as fp32."""

    is_sliced = False

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)
        self.where, self.config, self.tensors = path, self.file.config, self.file.tensors
        # Unpacking is dear, and the parts of a tensor are asked for one after the other.
        self._last = lru_cache(maxsize=1)(self.file.read)

    def weight_map(self) -> WeightMap:
        return self.file.weight_map()

    def read(self, name: str, index: Index = ()) -> Tensor:
        return torch.from_numpy(self._last(name))[index]

    def read_into(self, out: Tensor, name: str, index: Index = ()) -> None:
        out.copy_(self.read(name, index))


def open_source(place: Place) -> SafetensorsFolder | GgufWeights:
    """The weights at a place that has some."""
    return GgufWeights(place.path) if place.kind == "gguf" else SafetensorsFolder(place.path)
