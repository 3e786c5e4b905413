"""Random packed matrices of every kind, and the values that they stand for, computed without the layout."""

from functools import cache

import torch
from torch import Tensor

from moesaic.kernels import blocks, uneven
from moesaic.kernels.blocks import PackedMatrices
from moesaic.kernels.rounding import Bits

KINDS = [
    "fp32",
    "bf16",
    "fp8",
    "mxfp4",
    "uneven4",
    *(f"int{bits}/{group}" for bits in (8, 6, 4) for group in blocks.GROUPS),
]


@cache
def packed_and_weights(kind: str, outputs: int, inputs: int, paired: bool) -> tuple[PackedMatrices, Tensor]:
    """Three random matrices, and the values that they stand for, computed without the layout."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    shape = (3, outputs, inputs)
    weight = torch.randn(shape, generator=generator)
    name, _, group = kind.partition("/")
    if name in ("fp32", "bf16"):
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        return blocks.pack_floats(weight, name, paired=paired), weight.to(dtype).float()
    if name == "uneven4":
        return _uneven(shape, paired, generator)
    size = {"fp8": 128, "mxfp4": 32}.get(name) or int(group)
    num_groups = -(-inputs // size)
    if name == "fp8":
        values = weight.to(torch.float8_e4m3fn)
        values.view(torch.uint8)[0, 0, : min(inputs, 8)] = torch.arange(
            min(inputs, 8), dtype=torch.uint8
        )  # below normal
        scales = torch.rand(3, outputs, num_groups, generator=generator) + 0.5
        return blocks.pack_fp8(values, scales, paired=paired), _scaled(values.float(), scales, size)
    if name == "mxfp4":
        codes = torch.randint(16, shape, generator=generator, dtype=torch.uint8)
        exponents = torch.randint(120, 131, (3, outputs, num_groups), generator=generator, dtype=torch.uint8)
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes.long() & 7] * torch.where(codes > 7, -1.0, 1.0)
        return blocks.pack_mxfp4(codes, exponents, paired=paired), _scaled(
            values, 2.0 ** (exponents.float() - 127), size
        )
    bits: Bits = next(bits for bits, each in blocks.INTS.items() if each == name)
    most = 2 ** (bits - 1)
    numbers = torch.randint(-most + (bits == 8), most, shape, generator=generator, dtype=torch.int8)
    scales = (torch.rand(3, outputs, num_groups, generator=generator) + 0.1).half().float()
    return blocks.pack_ints(numbers, scales, bits, group=size, paired=paired), _scaled(numbers.float(), scales, size)


def _uneven(shape: tuple[int, int, int], paired: bool, generator: torch.Generator) -> tuple[PackedMatrices, Tensor]:
    codes = torch.randint(16, shape, generator=generator, dtype=torch.uint8)
    fields = [torch.randint(most, (*shape[:2], -(-shape[2] // 32)), generator=generator) for most in (8, 16, 16, 2, 2)]
    exponent, first, second, first_sign, second_sign = fields
    words = exponent + 20 << 10 | second_sign << 9 | second << 5 | first_sign << 4 | first
    magnitudes = [(1 + bits % 8 / 8) * 2.0 ** (exponent + bits // 8 - 7) for bits in (first, second)]
    scales = torch.stack((magnitudes[0] * (1 - 2 * first_sign), magnitudes[1] * (1 - 2 * second_sign)), dim=-1)
    signed = torch.tensor([0, 3, 7, 10, 14, 18, 23, 30, -34, -29, -22, -17, -13, -9, -6, -3.0])
    packed = blocks.pack_uneven4(codes, words.int(), paired=paired)
    return packed, _scaled(signed[codes.long()], scales.flatten(-2), uneven.GROUP)


def _scaled(values: Tensor, scales_EOG: Tensor, group: int) -> Tensor:
    return values * scales_EOG.repeat_interleave(group, dim=-1)[..., : values.shape[-1]]
