"""Weights packed for reading once, in order: what csrc/packed.h lays out, made and undone in plain torch.

E experts, O outputs, I inputs, G groups of inputs that share a scale, S strips of 32 outputs, N blocks of a strip.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from moesaic.checks import require
from moesaic.config.activation import Activation
from moesaic.kernels import uneven
from moesaic.kernels.rounding import Bits

Format = Literal["fp32", "bf16", "fp8", "int8", "int6", "int4", "mxfp4", "uneven4"]
FORMATS: tuple[Format, ...] = get_args(Format)
INTS: Mapping[Bits, Format] = {4: "int4", 6: "int6", 8: "int8"}
"""The format of whole numbers of so many bits."""
GROUPS = (32, 64, 128)
STRIP = 32
FP8_BLOCK, MXFP4_GROUP = 128, 32
# e2m1: one bit of sign, two of exponent, one of mantissa.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True, kw_only=True)
class PackedShape:
    """One matrix [outputs, inputs] in a format.

    group: inputs that share a scale, in int8, int6 and int4. paired: the matrix holds gate and then up, [2F, inputs],
    and a strip holds 16 outputs of each, so that whoever multiplies has both at hand.
    Raises ConfigError for an unknown format or group, and for paired outputs of an odd number.
    """

    format: Format
    outputs: int
    inputs: int
    group: int = 32
    paired: bool = False

    def __post_init__(self) -> None:
        require(self.format in FORMATS, f"weight format {self.format!r}; known: {', '.join(FORMATS)}")
        require(self.group in GROUPS, f"group={self.group}; use one of {', '.join(map(str, GROUPS))}")
        require(not self.paired or self.outputs % 2 == 0, f"{self.outputs} outputs cannot be gate and up, equally many")

    @property
    def block(self) -> int:
        """Inputs of a block."""
        fixed = {"fp32": 1, "bf16": 2, "fp8": FP8_BLOCK, "mxfp4": 2 * MXFP4_GROUP, "uneven4": uneven.BLOCK}
        return fixed.get(self.format, self.group)

    @property
    def scale_group(self) -> int:
        """Inputs that share a scale; 0 where there are none."""
        fixed = {"fp32": 0, "bf16": 0, "fp8": FP8_BLOCK, "mxfp4": MXFP4_GROUP, "uneven4": uneven.GROUP}
        return fixed.get(self.format, self.group)

    @property
    def num_blocks(self) -> int:
        return -(-self.inputs // self.block)

    @property
    def num_strips(self) -> int:
        return -(-(self.outputs // 2) // (STRIP // 2)) if self.paired else -(-self.outputs // STRIP)

    @property
    def num_bytes(self) -> int:
        """What a packed matrix takes, scales and padding included: a multiple of 64."""
        bits = {"fp32": 32, "bf16": 16, "int6": 6, "int4": 4, "mxfp4": 4, "uneven4": 4}.get(self.format, 8)
        return self.num_strips * self.num_blocks * (self.head_bytes + STRIP * self.block * bits // 8)

    @property
    def head_bytes(self) -> int:
        """Of a block's scales, which stand before its numbers."""
        return {"fp32": 0, "bf16": 0, "fp8": 4 * STRIP}.get(self.format, 2 * STRIP)


class PackedMatrices(NamedTuple):
    """E matrices of one shape; data uint8 [E, bytes of one]."""

    data: Tensor
    shape: PackedShape

    @property
    def bits_per_weight(self) -> float:
        """What is read for a weight, scales and padding included."""
        return 8 * self.data.shape[1] / (self.shape.outputs * self.shape.inputs)


class PackedExperts(NamedTuple):
    """A feed-forward block of E experts (E = 1: a dense one).

    into: F inner outputs of D inputs, or 2F where its shape is paired: gate and up. down: D outputs of F inputs. Biases
    fp32, into_bias_EG like the outputs of `into`. activation: silu, gelu, gelu_new, relu, relu2 (relu squared) or a
    clamped SwiGLU, of the gate where there is one.
    """

    into: PackedMatrices
    down: PackedMatrices
    activation: Activation
    into_bias_EG: Tensor | None = None
    down_bias_ED: Tensor | None = None


class ExpertRows(NamedTuple):
    """Rows sorted by expert: offsets [E+1], a weight each, and the rows of a token's choices (-1 for none)."""

    offsets: Tensor
    weights_R: Tensor
    row_of_TK: Tensor
    weight_on_input: bool = False


def pack_floats(weight_EOI: Tensor, format_: Literal["fp32", "bf16"], *, paired: bool = False) -> PackedMatrices:
    """Weights as they are, or rounded to bf16."""
    shape = PackedShape(format=format_, outputs=weight_EOI.shape[1], inputs=weight_EOI.shape[2], paired=paired)
    dtype = torch.float32 if format_ == "fp32" else torch.bfloat16
    in_strips = _in_strips(weight_EOI.to(dtype), shape)
    blocks = in_strips.unflatten(-1, (-1, shape.block)).transpose(2, 3)  # [E, S, N, 32, block]
    return PackedMatrices(_bytes_of(blocks).flatten(1), shape)


def pack_ints(
    values_EOI: Tensor, scales_EOG: Tensor, bits: Bits, *, group: int, paired: bool = False
) -> PackedMatrices:
    """Whole numbers (int8, of `bits` bits) times a scale, rounded to fp16, for each `group` of inputs."""
    outputs, inputs = values_EOI.shape[1:]
    shape = PackedShape(format=INTS[bits], outputs=outputs, inputs=inputs, group=group, paired=paired)
    offset = 1 << (bits - 1)
    unsigned = (_in_strips(values_EOI.short(), shape) + offset).to(torch.uint8)
    scales = _bytes_of(_in_strips(scales_EOG.half(), shape, group).transpose(2, 3))  # [E, S, N, 64]
    if bits == 8:
        numbers = unsigned.unflatten(-1, (shape.num_blocks, -1, 4)).permute(0, 1, 3, 4, 2, 5)
    else:
        numbers = _halves((unsigned & 15).unflatten(-1, (shape.num_blocks, -1, 2, 4)))
    if bits == 6:
        upper = _quarters((unsigned >> 4).unflatten(-1, (shape.num_blocks, -1, 4, 4)))
        numbers = torch.cat((numbers, upper), dim=3)
    return _joined(scales, numbers, shape)


def pack_mxfp4(codes_EOI: Tensor, exponents_EOG: Tensor, *, paired: bool = False) -> PackedMatrices:
    """Codes of e2m1 (0 to 15) times 2^(exponent - 127) for each 32 inputs."""
    shape = PackedShape(format="mxfp4", outputs=codes_EOI.shape[1], inputs=codes_EOI.shape[2], paired=paired)
    codes = _in_strips(codes_EOI, shape).unflatten(-1, (shape.num_blocks, -1, 2, 4))
    exponents = _in_strips(exponents_EOG, shape, MXFP4_GROUP).unflatten(-1, (shape.num_blocks, 2))
    return _joined(exponents.permute(0, 1, 3, 4, 2).flatten(-2), _halves(codes), shape)


def pack_uneven4(codes_EOI: Tensor, words_EOB: Tensor, *, paired: bool = False) -> PackedMatrices:
    """Codes of uneven values (0 to 15) with a word of two scales for each 32 inputs: see uneven.py."""
    shape = PackedShape(format="uneven4", outputs=codes_EOI.shape[1], inputs=codes_EOI.shape[2], paired=paired)
    codes = _in_strips(codes_EOI, shape).unflatten(-1, (shape.num_blocks, -1, 2, 4))
    words = _in_strips(words_EOB.short(), shape, uneven.BLOCK)  # [E, S, 32, N]
    return _joined(_bytes_of(words.transpose(2, 3)), _halves(codes), shape)


def pack_fp8(values_EOI: Tensor, scales_EOG: Tensor, *, paired: bool = False) -> PackedMatrices:
    """float8_e4m3fn times an fp32 scale for each 128 inputs of an output; NaN is kept as a scale of NaN."""
    shape = PackedShape(format="fp8", outputs=values_EOI.shape[1], inputs=values_EOI.shape[2], paired=paired)
    numbers = _in_strips(values_EOI.view(torch.uint8), shape).unflatten(-1, (shape.num_blocks, -1))
    scales = _in_strips(scales_EOG.float(), shape, FP8_BLOCK)  # [E, S, 32, N]
    scales = scales.masked_fill((numbers & 0x7F == 0x7F).any(-1), torch.nan)
    swapped = numbers << 4 | numbers >> 4
    pairs = swapped.unflatten(-1, (-1, 2)).unflatten(2, (2, 4, 4)).permute(0, 1, 5, 6, 3, 2, 4, 7)
    return _joined(_bytes_of(scales.transpose(2, 3)), pairs, shape)


def unpack(packed: PackedMatrices) -> Tensor:
    """The weights [E, O, I] that the packed numbers stand for, exactly, in fp32."""
    data, shape = packed
    blocks = data.unflatten(1, (shape.num_strips, shape.num_blocks, -1))
    if shape.format in ("fp32", "bf16"):
        dtype = torch.float32 if shape.format == "fp32" else torch.bfloat16
        values = blocks.contiguous().view(dtype).unflatten(-1, (STRIP, shape.block)).transpose(2, 3).flatten(-2).float()
        return _out_of_strips(values, shape)
    values, scales = _numbers(blocks, shape)  # [E, S, 32, inputs], [E, S, 32, groups]
    scaled = values.unflatten(-1, (-1, shape.scale_group)) * scales[..., None]
    return _out_of_strips(scaled.flatten(-2), shape)


def whole_numbers(packed: PackedMatrices) -> tuple[Tensor, Tensor]:
    """What unpacked weights are the product of: numbers [E, O, I] and scales [E, O, G], both fp32."""
    data, shape = packed
    blocks = data.unflatten(1, (shape.num_strips, shape.num_blocks, -1))
    values, scales = _numbers(blocks, shape)
    return _out_of_strips(values, shape), _out_of_strips(scales, shape, shape.scale_group)


def _numbers(blocks: Tensor, shape: PackedShape) -> tuple[Tensor, Tensor]:
    head, body = blocks[..., : shape.head_bytes], blocks[..., shape.head_bytes :]
    if shape.format == "fp8":
        pairs = (body << 4 | body >> 4).unflatten(-1, (-1, 4, 2, 4, 2)).permute(0, 1, 5, 4, 6, 2, 3, 7)
        values = pairs.flatten(5).flatten(2, 4).contiguous().view(torch.float8_e4m3fn).float()
        return values, head.contiguous().view(torch.float32).transpose(2, 3)
    if shape.format == "mxfp4":
        exponents = head.unflatten(-1, (2, STRIP)).contiguous().view(torch.float8_e8m0fnu).float()
        return E2M1[_whole(body, shape).long()], exponents.permute(0, 1, 4, 2, 3).flatten(-2)
    if shape.format == "uneven4":
        words = head.contiguous().view(torch.int16).int().transpose(2, 3) & 0xFFFF
        return uneven.VALUES[_whole(body, shape).long()], uneven.scales_of(words)
    scales = head.contiguous().view(torch.float16).float().transpose(2, 3)
    if shape.format == "int4":
        return _whole(body, shape).float() - 8, scales
    if shape.format == "int6":
        lower, upper = body.split((body.shape[-1] * 2 // 3, body.shape[-1] // 3), dim=-1)
        return (_whole(lower, shape) | _of_quarters(upper) << 4).float() - 32, scales
    quads = body.unflatten(-1, (-1, STRIP, 4)).permute(0, 1, 4, 2, 3, 5)
    return quads.flatten(3).float() - 128, scales


def _halves(numbers: Tensor) -> Tensor:
    """[E, S, 32, N, n, 2, 4] of four bits as [E, S, N, n, 32, 4] bytes: the first four in the low half."""
    low, high = numbers.unbind(-2)
    return (low | high << 4).permute(0, 1, 3, 4, 2, 5)


def _whole(body: Tensor, shape: PackedShape) -> Tensor:
    """The inverse of `_halves`, [E, S, 32, inputs]."""
    both = body.unflatten(-1, (-1, STRIP, 4)).permute(0, 1, 4, 2, 3, 5)
    return torch.stack((both & 15, both >> 4), dim=-2).flatten(3)


def _quarters(numbers: Tensor) -> Tensor:
    """[E, S, 32, N, n, 4, 4] of two bits as [E, S, N, n, 32, 4] bytes: the first four in the lowest."""
    shifted = [part << 2 * index for index, part in enumerate(numbers.unbind(-2))]
    return (shifted[0] | shifted[1] | shifted[2] | shifted[3]).permute(0, 1, 3, 4, 2, 5)


def _of_quarters(upper: Tensor) -> Tensor:
    """The inverse, [E, S, 32, inputs]."""
    all_four = upper.unflatten(-1, (-1, STRIP, 4)).permute(0, 1, 4, 2, 3, 5)
    return torch.stack([all_four >> 2 * index & 3 for index in range(4)], dim=-2).flatten(3)


def _joined(head: Tensor, numbers: Tensor, shape: PackedShape) -> PackedMatrices:
    """Blocks of the bytes of their scales [E, S, N, bytes] and then of their numbers [E, S, N, ...]."""
    return PackedMatrices(torch.cat((head, numbers.flatten(3)), dim=-1).flatten(1), shape)


def _bytes_of(x: Tensor) -> Tensor:
    """The bytes of the last dimension, or of the last two."""
    return x.contiguous().view(torch.uint8)


def _in_strips(x_EOI: Tensor, shape: PackedShape, unit: int = 1) -> Tensor:
    """[E, S, 32, inputs / unit], zeros in the padding."""
    padded_inputs = shape.num_blocks * shape.block // unit
    parts = x_EOI.chunk(2, dim=1) if shape.paired else (x_EOI,)
    width = STRIP // len(parts)
    padded = (pad(part, (0, padded_inputs - part.shape[2], 0, -part.shape[1] % width)) for part in parts)
    return torch.cat([part.unflatten(1, (-1, width)) for part in padded], dim=2)


def _out_of_strips(x: Tensor, shape: PackedShape, unit: int = 1) -> Tensor:
    """The inverse, without the padding."""
    inputs = -(-shape.inputs // unit)
    if not shape.paired:
        return x.flatten(1, 2)[:, : shape.outputs, :inputs]
    gate, up = (part.flatten(1, 2)[:, : shape.outputs // 2] for part in x.chunk(2, dim=2))
    return torch.cat((gate, up), dim=1)[..., :inputs]
