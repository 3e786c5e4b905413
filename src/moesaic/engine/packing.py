"""Which format each part of a model gets in a program, and how its matrices come to be in it.

E experts, O outputs, I inputs.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor

from moesaic.engine.weights import Weights
from moesaic.errors import ConfigError
from moesaic.hub.codes import CodedTensor, Codes, CodesFormat
from moesaic.hub.memory import empty
from moesaic.kernels.blocks import Format, PackedMatrices
from moesaic.kernels.native_packing import (
    Parts,
    pack_floats,
    pack_fp8,
    pack_mxfp4,
    pack_rounded,
    pack_rounded_uneven,
    pack_uneven4,
)
from moesaic.kernels.rounding import BITS, GROUP, Bits, Values


@dataclass(frozen=True, kw_only=True)
class Precision:
    """bits: of projections; None: as the files have them. experts_bits: of routed experts; None: `bits`.

    dtype: of what is not rounded, fp32 or bf16; None: as the files have it: fp32, bf16, FP8 in blocks, MXFP4 (other
    formats become fp32).
    values: what four bits stand for.
    The head has 8 bits where others have 8, and 6 where they have 4; matrices that heads read one by one (MLA) have 8.
    Routers, norms and embeddings are never rounded. Raises ConfigError for other bits or another dtype.
    """

    bits: Bits | None = None
    experts_bits: Bits | None = None
    dtype: torch.dtype | None = None
    values: Values = "even"

    def __post_init__(self) -> None:
        for value in (self.bits, self.experts_bits):
            if value is not None and value not in BITS:
                raise ConfigError(f"{value} bits; known: {', '.join(map(str, BITS))}, or none to keep what files have")
        if self.values not in get_args(Values):
            raise ConfigError(f"values={self.values!r}; known: {', '.join(get_args(Values))}")
        if self.values == "uneven" and 4 not in (self.bits, self.experts_bits):
            raise ConfigError("values='uneven' without 4 bits, which they are for; add bits=4, or leave them out")
        if self.dtype not in (None, torch.float32, torch.bfloat16):
            raise ConfigError(f"dtype={self.dtype}; known: torch.float32, torch.bfloat16, or none for the files' own")

    @property
    def of_experts(self) -> Bits | None:
        return self.experts_bits or self.bits

    @property
    def of_head(self) -> Bits | None:
        return 6 if self.bits == 4 else self.bits

    def keeps_codes(self, bits: Bits | None, format_: CodesFormat) -> bool:
        """Whether what has these bits, and is packed in files in a format, is multiplied as it lies there."""
        is_asked_for = format_ == "uneven4" and bits == 4 and self.values == "uneven"
        return is_asked_for or (bits is None and self.dtype is None)


@dataclass
class Packer:
    """Reads matrices and packs them, but for those that it holds packed already, by name.

    packed: all so far. bytes_by_format: of these, by part.
    """

    weights: Weights
    precision: Precision
    held: Mapping[str, PackedMatrices] = field(default_factory=dict)
    packed: dict[str, PackedMatrices] = field(default_factory=dict)
    bytes_by_format: dict[str, Counter[Format]] = field(default_factory=dict)

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """The tensor, or what one expert has of it, in the dtype that is asked for."""
        values = self.weights.read(name, expert)
        return values if self.precision.dtype is None else values.to(self.precision.dtype)

    def matrix(self, names: Sequence[str], bits: Bits | None, part: str, *, paired: bool = False) -> PackedMatrices:
        """One matrix: those of the names, one below the other."""

        def make() -> PackedMatrices:
            coded = self._coded(names, bits)
            if coded:
                return packed_codes(coded[0].format, [each.read(None) for each in coded], paired=paired)
            return self._rounded([self.read(name)[None] for name in names], bits, paired=paired)

        return self._once(" ".join(names), part, make)

    def tensor(self, name: str, read: Callable[[], Tensor], bits: Bits | None, part: str) -> PackedMatrices:
        """Matrices [E, O, I] that something else is made into."""
        return self._once(name, part, lambda: self._rounded(read(), bits))

    def exact(self, name: str, part: str) -> PackedMatrices:
        """A matrix in fp32, whatever the others have."""
        return self._once(name, part, lambda: pack_floats(self.weights.read(name).float()[None], "fp32"))

    def experts(self, name: str, num_experts: int, bits: Bits | None, *, paired: bool) -> PackedMatrices:
        """All experts' matrices of a name, read and packed one after the other."""

        coded = self._coded([name], bits)

        def pack(expert: int, out: Tensor | None = None) -> PackedMatrices:
            if coded:
                return packed_codes(coded[0].format, [coded[0].read(expert)], paired=paired, out=out)
            return self._rounded(self.read(name, expert)[None], bits, paired=paired, out=out)

        def make() -> PackedMatrices:
            first = pack(0)
            data = empty((num_experts, first.data.shape[1]), torch.uint8, "cpu")
            data[0] = first.data[0]
            for expert in range(1, num_experts):
                pack(expert, data[expert : expert + 1])
            return PackedMatrices(data, first.shape)

        return self._once(name, "experts", make)

    def _coded(self, names: Sequence[str], bits: Bits | None) -> list[CodedTensor]:
        """The tensors by their codes, where all are packed alike and stay so; else none."""
        found = [coded for name in names if (coded := self.weights.coded(name)) is not None]
        formats: set[CodesFormat] = {coded.format for coded in found}
        is_kept = len(formats) == 1 and self.precision.keeps_codes(bits, *formats)
        return found if len(found) == len(names) and is_kept else []

    def _rounded(
        self, weight_EOI: Parts, bits: Bits | None, *, paired: bool = False, out: Tensor | None = None
    ) -> PackedMatrices:
        return packed_as(weight_EOI, bits, values=self.precision.values, paired=paired, out=out)

    def _once(self, name: str, part: str, make: Callable[[], PackedMatrices]) -> PackedMatrices:
        packed = self.held[name] if name in self.held else make()
        self.packed[name] = packed
        self.bytes_by_format.setdefault(part, Counter())[packed.shape.format] += packed.data.nbytes
        return packed


def packed_as(
    weight_EOI: Parts,
    bits: Bits | None,
    *,
    values: Values = "even",
    paired: bool = False,
    out: Tensor | None = None,
) -> PackedMatrices:
    """Matrices rounded to `bits`, or as they are: fp32, or bf16 where they are that."""
    if bits == 4 and values == "uneven":
        return pack_rounded_uneven(weight_EOI, paired=paired, out=out)
    if bits is not None:
        return pack_rounded(weight_EOI, bits, group=GROUP, paired=paired, out=out)
    dtype = (weight_EOI if isinstance(weight_EOI, Tensor) else weight_EOI[0]).dtype
    return pack_floats(weight_EOI, "bf16" if dtype == torch.bfloat16 else "fp32", paired=paired, out=out)


def packed_codes(
    format_: CodesFormat, parts: Sequence[Codes], *, paired: bool = False, out: Tensor | None = None
) -> PackedMatrices:
    """One matrix of codes, in parts that stand one below the other, as they are."""
    pack = {"fp8": pack_fp8, "mxfp4": pack_mxfp4, "uneven4": pack_uneven4}[format_]
    values, scales = ([part[None] for part in each] for each in zip(*parts, strict=True))
    return pack(values, scales, paired=paired, out=out)
