"""Packed weights: the layout against its inverse, the compiled product against its definition.

R rows sorted by expert, E experts, I inputs, O outputs, G groups of inputs that share a scale.
"""

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.kernels import blocks, reference
from moesaic.kernels.blocks import PackedShape
from tests.packed_kinds import KINDS, packed_and_weights

native = pytest.importorskip("moesaic.kernels.native", reason="the kernels were not built: no C++ compiler")
_native = native._native

# outputs, inputs, paired: one, primes, whole strips and blocks, one more and one less
SIZES = [
    (1, 1, False),
    (33, 129, False),
    (64, 128, False),
    (97, 31, False),
    (2, 127, True),
    (62, 65, True),
    (32, 64, True),
]
COUNTS = [[0, 0, 0], [0, 1, 0], [1, 0, 3], [13, 2, 6], [0, 0, 25]]


def rows(counts: list[int], inputs: int) -> tuple[Tensor, Tensor]:
    """Rows whose memory starts one element past an aligned address, and their offsets."""
    total = sum(counts)
    x = torch.randn(total * inputs + 1, generator=torch.Generator().manual_seed(total))[1:].view(total, inputs)
    return x, torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_unpacking_gives_the_weights_to_the_bit(kind: str, size: tuple[int, int, bool]) -> None:
    packed, weights = packed_and_weights(kind, *size)
    assert torch.equal(blocks.unpack(packed), weights)
    shape = packed.shape
    assert packed.data.shape == (3, _native.packed_bytes(shape.format, *size[:2], shape.group, shape.paired))


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_its_definition(kind: str, isa: str) -> None:
    for size in SIZES:
        packed, weights = packed_and_weights(kind, *size)
        for counts in COUNTS:
            x_RI, offsets = rows(counts, size[1])
            got, wanted = native.packed_linear(x_RI, packed, offsets), reference.packed_linear(x_RI, packed, offsets)
            # Terms are the same but for the order of fp32 sums: of as many as there are inputs or groups.
            terms = reference.grouped_linear(x_RI.abs(), weights.abs(), offsets)
            assert bool(((got - wanted).abs() <= 2e-6 * terms + 1e-30).all()), (size, counts)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_for_rows_cost_what_rounding_costs(kind: str) -> None:
    """Each input is off by half a step of its group at most: 1/254 of the largest."""
    packed, weights = packed_and_weights(kind, 33, 129, False)
    x_RI, offsets = rows([13, 2, 6], 129)
    wanted = reference.grouped_linear(x_RI, weights, offsets)
    step = 0.0 if kind == "fp32" else 2**-8
    bound = reference.grouped_linear(x_RI.abs().amax(1, keepdim=True).expand_as(x_RI), weights.abs(), offsets) * step
    assert bool(((native.packed_linear(x_RI, packed, offsets) - wanted).abs() <= bound + 1e-3).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone_and_in_company(kind: str, isa: str) -> None:
    packed, _ = packed_and_weights(kind, 97, 129 if kind == "fp8" else 31, False)
    x_RI, offsets = rows([13, 2, 6], packed.shape.inputs)
    before = torch.get_num_threads()
    together = native.packed_linear(x_RI, packed, offsets)
    try:
        torch.set_num_threads(3)
        assert torch.equal(native.packed_linear(x_RI, packed, offsets), together)
    finally:
        torch.set_num_threads(before)
    for row in (0, 5, 12, 13, 20):
        expert = int(torch.searchsorted(offsets, row, right=True)) - 1
        alone = (torch.arange(4) > expert).long()
        assert torch.equal(native.packed_linear(x_RI[row : row + 1], packed, alone), together[row : row + 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(kind: str, poison: float, isa: str) -> None:
    packed, _ = packed_and_weights(kind, 33, 129, False)
    x_RI, offsets = rows([3, 2, 1], 129)
    x_RI[1, 77] = poison
    y_RO = native.packed_linear(x_RI, packed, offsets)
    finite = y_RO.isfinite().all(1).tolist()
    assert finite == [True, False, True, True, True, True]
    if kind not in ("fp32", "bf16", "fp8"):
        assert y_RO[1].isnan().all()


@pytest.mark.parametrize("rows_at_once", [1, 32])
def test_every_code_of_fp8(rows_at_once: int, isa: str) -> None:
    """Rows of 0 with a single 1 read the weights themselves: 256 outputs of 32 inputs, every code at every place."""
    codes = (torch.arange(256)[:, None] + torch.arange(32)).to(torch.uint8)
    codes = codes.where(codes & 0x7F != 0x7F, 0)
    scales = torch.logspace(-30, 30, 256)[:, None]
    packed = blocks.pack_fp8(codes.view(torch.float8_e4m3fn)[None], scales[None])
    wanted = codes.view(torch.float8_e4m3fn).float() * scales
    assert torch.equal(blocks.unpack(packed)[0], wanted)
    assert torch.equal(columns(packed, 32, 1.0, rows_at_once), wanted)


@pytest.mark.parametrize("rows_at_once", [1, 32])
def test_every_code_and_exponent_of_mxfp4(rows_at_once: int, isa: str) -> None:
    """As above; 127 is rounded to itself."""
    codes = ((torch.arange(256)[:, None] + torch.arange(32)) % 16).to(torch.uint8)
    exponents = torch.arange(256, dtype=torch.uint8)[:, None]
    packed = blocks.pack_mxfp4(codes[None], exponents[None])
    wanted = blocks.E2M1[codes.long()] * exponents.view(torch.float8_e8m0fnu).float()
    assert torch.equal(blocks.unpack(packed)[0][:255], wanted[:255]) and bool(wanted[255].isnan().all())
    found = columns(packed, 32, 127.0, rows_at_once)
    assert not found[255].isfinite().any()
    assert torch.equal(found[:248], 127 * wanted[:248])  # higher ones go beyond fp32


@pytest.mark.parametrize("rows_at_once", [1, 32])
def test_every_word_of_uneven_values(rows_at_once: int, isa: str) -> None:
    """As above: every scale and sign of both groups, and exponents from the least to that of no number."""
    exponents, bits = torch.tensor([0, 1, 30, 60, 61, 62])[:, None], torch.arange(32)
    words = (exponents << 10 | (bits ^ 21) << 5 | bits).flatten()[:, None].int()
    codes = ((torch.arange(len(words))[:, None] + torch.arange(32)) % 16).to(torch.uint8)
    packed = blocks.pack_uneven4(codes[None], words[None])
    wanted = blocks.unpack(packed)[0]
    assert wanted[:160].isfinite().all() and wanted[160:].isnan().all()
    found = columns(packed, 32, 127.0, rows_at_once)
    assert torch.equal(found[:160], 127 * wanted[:160]) and bool(found[160 + 31].isnan().all())


def test_what_is_no_number_in_fp8_shows(isa: str) -> None:
    values = torch.ones(1, 40, 200).to(torch.float8_e4m3fn)
    values.view(torch.uint8)[0, 33, 140] = 0xFF
    packed = blocks.pack_fp8(values, torch.ones(1, 40, 2))
    y_RO = native.packed_linear(torch.zeros(3, 200), packed, torch.tensor([0, 3]))
    assert y_RO.isnan().nonzero()[:, 1].tolist() == [33, 33, 33]


def columns(packed: blocks.PackedMatrices, inputs: int, value: float, rows_at_once: int) -> Tensor:
    """Weights times `value` [O, I], read by rows that have one number."""
    x_II = value * torch.eye(inputs)
    parts = [native.packed_linear(x_RI, packed, torch.tensor([0, len(x_RI)])) for x_RI in x_II.split(rows_at_once)]
    return torch.cat(parts).T


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="weight format 'int3'; known: fp32, bf16, fp8, int8, int6, int4, mxfp4, uneven4"
    ):
        PackedShape(format="int3", outputs=1, inputs=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="group=48; use one of 32, 64, 128"):
        PackedShape(format="int4", outputs=1, inputs=1, group=48)
    with pytest.raises(ConfigError, match="3 outputs cannot be gate and up"):
        PackedShape(format="int4", outputs=3, inputs=1, paired=True)


def test_bits_per_weight() -> None:
    def bits(kind: str) -> float:
        return packed_and_weights(kind, 64, 128, False)[0].bits_per_weight

    assert bits("int4/32") == 4.5 and bits("int8/128") == 8.125 and bits("bf16") == 16 and bits("mxfp4") == 4.25
    assert bits("fp8") == 8.25 and bits("uneven4") == 4.5
