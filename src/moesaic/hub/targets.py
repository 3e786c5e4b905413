"""What the files of a conversion will hold: names, shapes, number formats, and the parts of the model in them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

from moesaic import families
from moesaic.errors import ConfigError
from moesaic.hub.checkpoint import check_tensors
from moesaic.hub.encodings import Encoding, Fp4, Fp8, Mxfp4, Plain
from moesaic.hub.layouts import Layout, in_layout
from moesaic.hub.quantization import Format, PackedAs
from moesaic.hub.safetensors_header import ITEM_BYTES
from moesaic.hub.sources import GgufWeights, SafetensorsFolder
from moesaic.hub.stored import DTYPES, STORED, known_dtype
from moesaic.hub.values import Part
from moesaic.models.weight_map import WeightMap, file_shapes

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PACKED_ROLES = ("attention", "mlp", "experts", "shared_experts")
# Read as plain tensors by other programs: an indexer's head weights, compressors, what joins parts of further tokens.
NEVER_PACKED = (
    ".indexer.weights_proj.weight",
    ".compressor.wkv.weight",
    ".compressor.wgate.weight",
    ".eh_proj.weight",
)
_INTEGERS = {"I64": torch.int64, "I32": torch.int32}


class Target(NamedTuple):
    """One tensor of the model as the new files name it; without parts it is a stored one, copied as it lies."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    encoding: Encoding

    @property
    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return self.encoding.stored(self.name, self.shape)

    @property
    def num_bytes(self) -> int:
        return sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in self.stored.values())


class Packer(Protocol):
    """A way to pack some tensors of a conversion, handed in from outside: which, how, and what config.json says."""

    def encoding(self, name: str, shape: tuple[int, ...], parts: tuple[Part, ...]) -> Encoding | None:
        """That of a tensor; None for those that stay."""
        ...

    def describe(self, targets: list[Target]) -> dict[str, Any]:
        """The fields of config.json that say so."""
        ...


class Plan:
    """Every target of a conversion, in the order of the model's tensors.

    dtype None keeps every tensor as it is, packed ones too; layout None keeps that of the files; what `packer` packs is
    its affair. Raises ConfigError for a format or a layout that nothing could read for this family, CheckpointError for
    tensors that are missing, of the wrong shape or, unless allowed, too many (`left_out` has those).
    """

    def __init__(
        self,
        source: SafetensorsFolder | GgufWeights,
        dtype: Format | None = None,
        layout: Layout | None = None,
        *,
        allow_extra: bool = False,
        packer: Packer | None = None,
    ) -> None:
        self.source, self.dtype, self.packer = source, dtype, packer
        config = source.config
        self.style: PackedAs = families.packed_as(config.family)
        self.as_stored = source.weight_map()
        self.left_out = check_tensors(config, self.as_stored, source.tensors, source.where, allow_extra=allow_extra)
        weight_map = self._map_to_write(layout)
        parts: dict[str, list[Part]] = {}
        for spec in config.tensors():
            for piece in weight_map[spec.name]:
                parts.setdefault(piece.name, []).append(Part(spec, piece))
        shapes = file_shapes(config.tensors(), weight_map).items()
        self.targets = [one for name, shape in shapes for one in self._targets(name, shape, tuple(parts[name]))]
        self._check()

    def _map_to_write(self, layout: Layout | None) -> WeightMap:
        config = self.source.config
        if layout is None and isinstance(self.source, SafetensorsFolder):
            return self.as_stored
        return in_layout(config, families.family(config.family).weight_map(config), layout)

    def _targets(self, name: str, shape: tuple[int, ...], parts: tuple[Part, ...]) -> list[Target]:
        """A tensor of the model, or the stored ones that it is packed in where these stay as they are."""
        source = self.source
        if self.dtype is None and isinstance(source, SafetensorsFolder) and source.quantization:
            if packed := source.packed(name):
                headers = {each: source.stored.tensors[each] for each in packed}
                return [Target(each, header.shape, (), Plain(STORED[header.dtype])) for each, header in headers.items()]
            if any(source.packed(piece.name) for part in parts for piece in self.as_stored[part.spec.name]):
                raise ConfigError("packed weights change their layout only unpacked; give --dtype bf16 or fp32, too")
        return [Target(name, shape, parts, self._encoding(name, shape, parts))]

    def _encoding(self, name: str, shape: tuple[int, ...], parts: tuple[Part, ...]) -> Encoding:
        spec = parts[0].spec
        if self.packer and (packed := self.packer.encoding(name, shape, parts)):
            return packed
        if spec.dtype == "float32":
            return Plain(torch.float32)
        if spec.dtype == "int32":
            return Plain(self._own_dtype(parts, _INTEGERS))
        if self.dtype in PLAIN:
            return Plain(PLAIN[self.dtype])
        is_matrix = len(shape) == 2 and min(shape) > 1 and name.endswith(".weight")
        may_pack = spec.role in _PACKED_ROLES and not name.endswith(NEVER_PACKED)
        is_eights = self.dtype == "fp8" or (self.dtype == "mxfp4" and self.style == "scale")
        if is_eights and is_matrix and may_pack:
            return Fp4() if self.dtype == "mxfp4" and spec.role == "experts" else Fp8(self.style)
        if self.dtype == "mxfp4" and spec.role == "experts" and len(shape) == 3 and parts[0].piece.transposed:
            return Mxfp4()
        return Plain(self._own_dtype(parts))

    def _own_dtype(self, parts: tuple[Part, ...], known: Mapping[str, torch.dtype] = DTYPES) -> torch.dtype:
        """The widest type among those that these tensors have in their files."""
        names = [piece.name for part in parts for piece in self.as_stored[part.spec.name]]
        kinds = {known_dtype(name, self.source.tensors[name], known) for name in names}
        return max(kinds, key=lambda kind: (kind.itemsize, kind == torch.bfloat16))

    def _check(self) -> None:
        family = self.source.config.family
        if self.dtype == "mxfp4" and not any(isinstance(target.encoding, Mxfp4 | Fp4) for target in self.targets):
            raise ConfigError(
                f"mxfp4 packs experts that are stacked as gpt_oss stacks them, not {family}; use fp8 or bf16"
            )
        experts = (one for one in self.targets if one.parts and one.parts[0].spec.role == "experts")
        stacked = [one for one in experts if len(one.shape) > 1 and isinstance(one.encoding, Plain)]
        if self.dtype == "fp8" and stacked:
            raise ConfigError(
                f"fp8 needs a tensor per expert and {stacked[0].name} stacks them; "
                "use --layout per-expert where the family has it, else bf16"
            )
