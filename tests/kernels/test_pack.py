"""Compiled packing: the bytes of the layout's definition in torch, on every instruction set and number of threads.

E experts, O outputs, I inputs, G groups of inputs that share a scale.
"""

from functools import cache

import pytest
import torch
from torch import Tensor

from moesaic.kernels import blocks, uneven
from moesaic.kernels.blocks import PackedMatrices
from moesaic.kernels.rounding import Bits, round_to_ints

native = pytest.importorskip("moesaic.kernels.native", reason="the kernels were not built: no C++ compiler")
from moesaic.kernels import native_packing  # noqa: E402

_native = native._native

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
INTS = [(bits, group) for bits in (8, 6, 4) for group in blocks.GROUPS]
# outputs, inputs, paired: one, primes, whole strips and blocks, one more and one less
SIZES = [
    (1, 1, False),
    (33, 129, False),
    (64, 256, False),
    (97, 31, False),
    (65, 200, False),
    (2, 127, True),
    (62, 65, True),
    (96, 130, True),
]


@cache
def weights(dtype: torch.dtype, outputs: int, inputs: int) -> Tensor:
    """Two matrices of numbers large and small, equal and 0, below normal and beyond fp16, from an odd address on."""
    generator = torch.Generator().manual_seed(outputs * inputs)
    count = 2 * outputs * inputs
    magnitudes = torch.tensor([1.0, 1.0, 1.0, 0.01, 1e-7, 1e-40, 3e4, 3e7])
    rows = magnitudes[torch.randint(len(magnitudes), (2 * outputs, 1), generator=generator)]
    x = torch.randn(2 * outputs, inputs, generator=generator) * rows
    steps = (x[: outputs // 2] * 4).round() / 4  # ties between magnitudes, and halves of a step
    x[: outputs // 2] = steps
    x[-1, : inputs // 2] = 0.0
    whole = torch.empty(count + 1, dtype=dtype)[1:].view(2, outputs, inputs)
    limit = torch.finfo(torch.float16).max if dtype == torch.float16 else 1e38
    return whole.copy_(x.clamp(-limit, limit).view_as(whole))


def rounded(weight: Tensor, bits: Bits, group: int, paired: bool) -> PackedMatrices:
    return blocks.pack_ints(*round_to_ints(weight, bits, group), bits, group=group, paired=paired)


def assert_same(found: PackedMatrices, wanted: PackedMatrices) -> None:
    assert found.shape == wanted.shape and found.data.shape == wanted.data.shape
    assert torch.equal(found.data, wanted.data)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format_", ["fp32", "bf16"])
def test_floats(format_: str, dtype: torch.dtype, size: tuple[int, int, bool], isa: str) -> None:
    outputs, inputs, paired = size
    weight = weights(dtype, outputs, inputs)
    found = native_packing.pack_floats(weight, format_, paired=paired)  # pyright: ignore[reportArgumentType]
    assert_same(found, blocks.pack_floats(weight, format_, paired=paired))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("bits", "group"), INTS)
def test_rounding(bits: Bits, group: int, dtype: torch.dtype, size: tuple[int, int, bool], isa: str) -> None:
    outputs, inputs, paired = size
    weight = weights(dtype, outputs, inputs)
    found = native_packing.pack_rounded(weight, bits, group=group, paired=paired)
    assert_same(found, rounded(weight, bits, group, paired))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("bits", "group"), INTS)
def test_ints(bits: Bits, group: int, size: tuple[int, int, bool], isa: str) -> None:
    outputs, inputs, paired = size
    values, scales = round_to_ints(weights(torch.float32, outputs, inputs), bits, group)
    found = native_packing.pack_ints(values, scales.float(), bits, group=group, paired=paired)
    assert_same(found, blocks.pack_ints(values, scales, bits, group=group, paired=paired))


@pytest.mark.parametrize("size", SIZES)
def test_mxfp4(size: tuple[int, int, bool], isa: str) -> None:
    outputs, inputs, paired = size
    codes = torch.randint(16, (2, outputs, inputs), dtype=torch.uint8)
    exponents = torch.randint(256, (2, outputs, -(-inputs // 32)), dtype=torch.uint8)
    found = native_packing.pack_mxfp4(codes, exponents, paired=paired)
    assert_same(found, blocks.pack_mxfp4(codes, exponents, paired=paired))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_to_uneven_values(dtype: torch.dtype, size: tuple[int, int, bool], isa: str) -> None:
    outputs, inputs, paired = size
    weight = weights(dtype, outputs, inputs)
    found = native_packing.pack_rounded_uneven(weight, paired=paired)
    assert_same(found, blocks.pack_uneven4(*uneven.round_to_codes(weight), paired=paired))


@pytest.mark.parametrize("size", SIZES)
def test_uneven_values(size: tuple[int, int, bool], isa: str) -> None:
    outputs, inputs, paired = size
    codes = torch.randint(16, (2, outputs, inputs), dtype=torch.uint8)
    words = torch.randint(1 << 16, (2, outputs, -(-inputs // 32)), dtype=torch.int32)
    found = native_packing.pack_uneven4(codes, words, paired=paired)
    assert_same(found, blocks.pack_uneven4(codes, words, paired=paired))


@pytest.mark.parametrize("size", SIZES)
def test_fp8(size: tuple[int, int, bool], isa: str) -> None:
    outputs, inputs, paired = size
    values = torch.randint(256, (2, outputs, inputs), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.randn(2, outputs, -(-inputs // 128))
    found = native_packing.pack_fp8(values, scales, paired=paired)
    assert_same(found, blocks.pack_fp8(values, scales, paired=paired))


def parts(x_EOI: Tensor, cuts: list[int]) -> list[Tensor]:
    return [part.contiguous() for part in x_EOI.split(cuts, dim=1)]


@pytest.mark.parametrize("cuts", [[96], [48, 48], [1, 40, 55], [95, 0, 1]])
@pytest.mark.parametrize("paired", [False, True])
def test_parts_need_not_be_joined(cuts: list[int], paired: bool) -> None:
    weight = weights(torch.bfloat16, 96, 130)
    floats = native_packing.pack_floats(parts(weight, cuts), "bf16", paired=paired)
    assert_same(floats, blocks.pack_floats(weight, "bf16", paired=paired))
    of_values = native_packing.pack_rounded_uneven(parts(weight, cuts), paired=paired)
    assert_same(of_values, blocks.pack_uneven4(*uneven.round_to_codes(weight), paired=paired))
    ints = native_packing.pack_rounded(parts(weight, cuts), 4, group=32, paired=paired)
    assert_same(ints, rounded(weight, 4, 32, paired))
    values, scales = round_to_ints(weight, 8, 64)
    again = native_packing.pack_ints(parts(values, cuts), parts(scales, cuts), 8, group=64, paired=paired)
    assert_same(again, rounded(weight, 8, 64, paired))


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads(threads: int) -> None:
    weight = weights(torch.bfloat16, 1000, 130)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(native_packing.pack_floats(weight, "bf16"), blocks.pack_floats(weight, "bf16"))
        assert_same(native_packing.pack_rounded(weight, 4, group=64), rounded(weight, 4, 64, False))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_group(poison: float, isa: str) -> None:
    weight = torch.randn(1, 40, 100)
    weight[0, 33, 70] = poison
    assert bool(blocks.unpack(native_packing.pack_floats(weight, "bf16"))[0, 33, 70].isnan() == (poison != poison))
    of_values = blocks.unpack(native_packing.pack_rounded_uneven(weight))
    assert of_values.isnan().nonzero()[:, 1:].tolist() == [[33, i] for i in range(64, 96)]
    for bits in (8, 6, 4):
        found = blocks.unpack(native_packing.pack_rounded(weight, bits, group=32))
        wanted = blocks.unpack(rounded(weight, bits, 32, False))
        assert torch.equal(found.isfinite(), wanted.isfinite()) and torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found[wanted.isfinite()], wanted[wanted.isfinite()])


def test_nothing_to_pack() -> None:
    for shape in ((0, 33, 70), (2, 0, 70), (2, 33, 0)):
        weight = torch.zeros(shape)
        assert_same(native_packing.pack_floats(weight, "bf16"), blocks.pack_floats(weight, "bf16"))


def test_what_does_not_fit_is_refused() -> None:
    weight = torch.zeros(1, 4, 32)
    with pytest.raises(ValueError, match=r"weights has shape \[1, 4, 31\]; it must be \[1, \*, 32\]"):
        native_packing.pack_floats([weight, weight[..., :31]], "bf16")
    with pytest.raises(ValueError, match="weights has a dtype that this operation does not take; use float32"):
        native_packing.pack_floats([weight, weight.bfloat16()], "bf16")
    with pytest.raises(ValueError, match=r"out has shape \[1, 1\]"):
        native_packing.pack_floats(weight, "bf16", out=torch.zeros(1, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="scales have other rows than the weights"):
        native_packing.pack_ints(weight.to(torch.int8), torch.ones(1, 3, 1), 8, group=32)
