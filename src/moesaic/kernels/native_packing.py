"""Compiled packing under the names of blocks.py: the same bytes, each row of the source read once.

Importing this fails where the kernels were not built. A weight may be given in parts that stand one below the other
([E, o, I] each, of one dtype: query, key and value, or gate and up), and parts may lie anywhere in memory, such as in a
mapped file. E experts, O outputs, I inputs, G groups of inputs that share a scale.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moesaic.kernels.blocks import INTS, Format, PackedMatrices, PackedShape
from moesaic.kernels.native import _array, _native, _threads
from moesaic.kernels.rounding import Bits

Parts = Tensor | Sequence[Tensor]


def pack_floats(
    weight_EOI: Parts, format_: Literal["fp32", "bf16"], *, paired: bool = False, out: Tensor | None = None
) -> PackedMatrices:
    """See blocks.pack_floats. out: where to, uint8 [E, bytes of one]; so for all of these."""
    return _pack(weight_EOI, (), format_, 32, paired, out)


def pack_rounded(
    weight_EOI: Parts, bits: Bits, *, group: int, paired: bool = False, out: Tensor | None = None
) -> PackedMatrices:
    """What blocks.pack_ints makes of rounding.round_to_ints, in one pass; weights are fp32, bf16 or fp16.

    Groups with NaN have a scale of NaN.
    """
    return _pack(weight_EOI, (), INTS[bits], group, paired, out)


def pack_ints(
    values_EOI: Parts,
    scales_EOG: Parts,
    bits: Bits,
    *,
    group: int,
    paired: bool = False,
    out: Tensor | None = None,
) -> PackedMatrices:
    """See blocks.pack_ints."""
    scales = [scales.half() for scales in _parts(scales_EOG)]
    return _pack(values_EOI, scales, INTS[bits], group, paired, out)


def pack_mxfp4(
    codes_EOI: Parts, exponents_EOG: Parts, *, paired: bool = False, out: Tensor | None = None
) -> PackedMatrices:
    """See blocks.pack_mxfp4."""
    return _pack(codes_EOI, exponents_EOG, "mxfp4", 32, paired, out)


def pack_rounded_uneven(weight_EOI: Parts, *, paired: bool = False, out: Tensor | None = None) -> PackedMatrices:
    """What blocks.pack_uneven4 makes of uneven.round_to_codes, in one pass; weights are fp32, bf16 or fp16.

    It takes four times as long as even steps.
    """
    return _pack(weight_EOI, (), "uneven4", 32, paired, out)


def pack_uneven4(
    codes_EOI: Parts, words_EOB: Parts, *, paired: bool = False, out: Tensor | None = None
) -> PackedMatrices:
    """See blocks.pack_uneven4."""
    words = [words.short().view(torch.float16) for words in _parts(words_EOB)]  # any type of 16 bits
    return _pack(codes_EOI, words, "uneven4", 32, paired, out)


def pack_fp8(
    values_EOI: Parts, scales_EOG: Parts, *, paired: bool = False, out: Tensor | None = None
) -> PackedMatrices:
    """See blocks.pack_fp8."""
    values = [values.view(torch.uint8) for values in _parts(values_EOI)]
    return _pack(values, scales_EOG, "fp8", 32, paired, out)


def _parts(parts: Parts) -> list[Tensor]:
    return [parts] if isinstance(parts, Tensor) else list(parts)


def _pack(
    values_EOI: Parts, scales_EOG: Parts, format_: Format, group: int, paired: bool, out: Tensor | None
) -> PackedMatrices:
    values, scales = ([part.contiguous() for part in _parts(parts)] for parts in (values_EOI, scales_EOG))
    matrices, outputs, inputs = values[0].shape[0], sum(part.shape[1] for part in values), values[0].shape[2]
    shape = PackedShape(format=format_, outputs=outputs, inputs=inputs, group=group, paired=paired)
    if out is None:
        out = torch.empty(matrices, _native.packed_bytes(format_, outputs, inputs, group, paired), dtype=torch.uint8)
    arrays = ([_array(part.detach()) for part in parts] for parts in (values, scales))
    _native.pack(*arrays, _array(out), format_, group, paired, _threads())
    return PackedMatrices(out, shape)
