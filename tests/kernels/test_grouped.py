"""The grouped matrix products and their gradients, against the same sums in fp64 and a bound on their rounding.

The bound: products of two bf16 are exact in fp32, those of two fp32 round once (or not, in a fused multiply-add). A sum
of k terms in fp32, in whatever order, is off by at most about k u sum|x||w| with u = 2^-24 (Higham, Accuracy and
Stability of Numerical Algorithms, 3.1 and 4.2). Kept in bf16, the result is rounded once more, by 2^-8 of itself.
Instructions for bf16 take denormal numbers for zero, which is far below all of that.

R rows sorted by expert, E experts, I inputs, O outputs, F expert inner.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from moesaic.kernels import reference

native = pytest.importorskip("moesaic.kernels.native", reason="the kernels were not built: no C++ compiler")
_native = native._native

DTYPES = [torch.float32, torch.bfloat16]
COUNTS = [[0, 0, 0], [0, 1, 0], [1, 0, 3, 2], [5, 0, 11], [40, 1, 0, 2], [7, 33, 17, 0, 65], [130]]
SIZES = [(1, 2), (17, 6), (33, 26), (64, 98), (257, 62), (96, 34), (31, 50)]  # inputs, outputs


@pytest.fixture(params=_native.available_isas(), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set, with every expert's products computed by it."""
    monkeypatch.setattr(native, "_LIBRARY_ROWS", {})
    before = _native.isa()
    assert _native.use_isa(request.param)
    yield request.param
    _native.use_isa(before)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def no_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, too, go through the blocked product."""
    monkeypatch.setattr(native, "_FEW_ROWS", dict.fromkeys(DTYPES, 0))


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers whose memory starts one element past an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    numel = int(torch.Size(shape).numel())
    return torch.randn(numel + 1, generator=generator).to(dtype)[1:].view(shape)


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])


def within_bound(got: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """`magnitude` is the same sum with every factor made positive."""
    assert got.shape == exact.shape
    once_more = 2**-8 * exact.abs() if got.dtype == torch.bfloat16 else 0
    bound = ((terms + 2) * 2**-24 * magnitude + once_more) * 1.01 + 1e-30
    excess = (got.double() - exact).abs() - bound
    assert not excess.numel() or excess.max() <= 0, f"off by {excess.max():.3g} more than the bound"


def check_product(function: Callable[[Tensor, Tensor, Tensor], Tensor], one: Tensor, other: Tensor, offsets: Tensor,
                  got: Tensor, terms: int) -> None:  # fmt: skip
    exact = function(one.double(), other.double(), offsets)
    within_bound(got, exact, function(one.double().abs(), other.double().abs(), offsets), terms)


def check_all(counts: list[int], inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Forward, both gradients, and the gradient of the weights written and added in fp32."""
    offsets, rows = offsets_of(counts), sum(counts)
    x_RI, dy_RO = rand(rows, inputs, dtype=dtype), rand(rows, outputs, dtype=dtype, seed=1)
    weight_EOI = rand(len(counts), outputs, inputs, dtype=dtype, seed=2)
    y_RO = native.grouped_linear(x_RI, weight_EOI, offsets)
    check_product(reference.grouped_linear, x_RI, weight_EOI, offsets, y_RO, inputs)
    dx_RI = native.grouped_linear_input_grad(dy_RO, weight_EOI, offsets)
    check_product(reference.grouped_linear_input_grad, dy_RO, weight_EOI, offsets, dx_RI, outputs)
    dw_EOI = native.grouped_linear_weight_grad(dy_RO, x_RI, offsets)
    assert dw_EOI.dtype == dtype
    check_product(reference.grouped_linear_weight_grad, dy_RO, x_RI, offsets, dw_EOI, max(counts))
    sum_EOI = torch.full(weight_EOI.shape, torch.nan)
    native.add_grouped_linear_weight_grad(dy_RO, x_RI, offsets, sum_EOI, False)
    check_product(reference.grouped_linear_weight_grad, dy_RO, x_RI, offsets, sum_EOI, max(counts))
    if dtype == torch.float32:
        assert torch.equal(sum_EOI, dw_EOI)
    twice = sum_EOI.clone()
    native.add_grouped_linear_weight_grad(dy_RO, x_RI, offsets, twice, True)
    assert torch.equal(twice, sum_EOI + sum_EOI)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_products_stay_within_their_bound(counts: list[int], dtype: torch.dtype, threads: int) -> None:
    for inputs, outputs in SIZES:
        check_all(counts, inputs, outputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tail(dtype: torch.dtype, no_strips: None) -> None:
    for size in range(1, 35):
        check_all([3, 0, size], size, 36 - size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "inputs", "outputs"), [([37], 4501, 35), ([9], 35, 4501), ([4501], 41, 67)])
def test_long_sums_go_in_several_passes(counts: list[int], inputs: int, outputs: int, dtype: torch.dtype) -> None:
    check_all(counts, inputs, outputs, dtype)


@pytest.mark.parametrize(
    ("dtype", "reused_bytes"), [(torch.float32, 0), (torch.float32, 32 << 20), (torch.bfloat16, 32 << 20)]
)
def test_large_gradients_are_written_past_the_caches_where_pages_are_not_new(
    dtype: torch.dtype, reused_bytes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_REUSED_BYTES", reused_bytes)
    check_all([3, 0, 17, 1, 9, 2], 1024, 512, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_gated_is_its_two_steps(counts: list[int], dtype: torch.dtype, threads: int) -> None:
    for inputs, inner in SIZES:
        x_RI, weight = rand(sum(counts), inputs, dtype=dtype), rand(len(counts), 2 * inner, inputs, dtype=dtype, seed=1)
        y_RF, gate_up_RG = native.grouped_gated(x_RI, weight, offsets_of(counts))
        assert torch.equal(gate_up_RG, native.grouped_linear(x_RI, weight, offsets_of(counts)))
        assert torch.equal(y_RF, native.silu_mul(gate_up_RG))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_narrow_weights_beside_wide_rows_are_the_same_numbers(counts: list[int], threads: int) -> None:
    offsets = offsets_of(counts)
    for inputs, inner in [*SIZES, (2501, 35)]:
        x_RI = rand(sum(counts), inputs)
        narrow = rand(len(counts), 2 * inner, inputs, dtype=torch.bfloat16, seed=1)
        wide = narrow.float()
        assert torch.equal(native.grouped_linear(x_RI, narrow, offsets), native.grouped_linear(x_RI, wide, offsets))
        for got, wanted in zip(
            native.grouped_gated(x_RI, narrow, offsets), native.grouped_gated(x_RI, wide, offsets), strict=True
        ):
            assert got.dtype == torch.float32 and torch.equal(got, wanted)
        check_product(reference.grouped_linear, x_RI, wide, offsets,
                      reference.grouped_linear(x_RI, narrow, offsets), inputs)  # fmt: skip


def test_torch_takes_many_rows_of_narrow_weights_too(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_LIBRARY_ROWS", {(isa, torch.float32): 9})
    x_RI, narrow, offsets = rand(25, 33), rand(2, 26, 33, dtype=torch.bfloat16, seed=1), offsets_of([4, 21])
    product = native.grouped_linear(x_RI, narrow, offsets)
    check_product(reference.grouped_linear, x_RI, narrow.float(), offsets, product, 33)
    gated, gate_up_RG = native.grouped_gated(x_RI, narrow, offsets)
    assert torch.equal(gate_up_RG, product) and torch.equal(gated, native.silu_mul(product))


def test_weights_wider_than_their_rows_are_refused() -> None:
    x_RI, weight_EOI, y_RO = rand(3, 5, dtype=torch.bfloat16), rand(1, 4, 5), torch.empty(3, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight_EOI has a dtype .* use bfloat16"):
        _native.grouped_linear(*map(native._array, (x_RI, weight_EOI, offsets_of([3]), y_RO)), 4, 9, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_does_not_depend_on_its_company(dtype: torch.dtype, no_strips: None) -> None:
    """Row by row and in any number of rows, the same bits: nothing of a block's size reaches its elements."""
    rows, inputs, outputs = 430, 83, 131
    x_RI, weight_EOI = rand(rows, inputs, dtype=dtype), rand(1, outputs, inputs, dtype=dtype, seed=1)
    dy_RO = rand(rows, outputs, dtype=dtype, seed=2)
    y_RO = native.grouped_linear(x_RI, weight_EOI, offsets_of([rows]))
    dx_RI = native.grouped_linear_input_grad(dy_RO, weight_EOI, offsets_of([rows]))
    for start, size in [(0, 1), (3, 17), (30, 70), (429, 1)]:
        part = slice(start, start + size)
        assert torch.equal(native.grouped_linear(x_RI[part], weight_EOI, offsets_of([size])), y_RO[part])
        assert torch.equal(native.grouped_linear_input_grad(dy_RO[part], weight_EOI, offsets_of([size])), dx_RI[part])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[900, 3, 0, 20, 1], [5] * 60], ids=["one hot", "many cold"])
def test_results_are_bit_equal_on_any_number_of_threads(counts: list[int], dtype: torch.dtype) -> None:
    inputs, outputs, rows, offsets = 129, 160, sum(counts), offsets_of(counts)
    x_RI, dy_RO = rand(rows, inputs, dtype=dtype), rand(rows, outputs, dtype=dtype, seed=1)
    weight_EOI = rand(len(counts), outputs, inputs, dtype=dtype, seed=2)

    def everything() -> list[Tensor]:
        sums = torch.ones(weight_EOI.shape)
        native.add_grouped_linear_weight_grad(dy_RO, x_RI, offsets, sums, True)
        return [
            native.grouped_linear(x_RI, weight_EOI, offsets),
            *native.grouped_gated(x_RI, weight_EOI, offsets),
            native.grouped_linear_input_grad(dy_RO, weight_EOI, offsets),
            native.grouped_linear_weight_grad(dy_RO, x_RI, offsets),
            sums,
        ]

    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 3, 8):
        torch.set_num_threads(num_threads)
        results.append(everything())
    torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_without_rows_have_exact_zeros_for_gradients(dtype: torch.dtype) -> None:
    x_RI, dy_RO, offsets = rand(5, 40, dtype=dtype), rand(5, 24, dtype=dtype), offsets_of([0, 5, 0])
    assert native.grouped_linear_weight_grad(dy_RO, x_RI, offsets)[[0, 2]].eq(0).all()
    sum_EOI = torch.full((3, 24, 40), torch.nan)
    native.add_grouped_linear_weight_grad(dy_RO, x_RI, offsets, sum_EOI, False)
    assert sum_EOI[[0, 2]].eq(0).all() and sum_EOI[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nans_stay_in_their_row(dtype: torch.dtype, no_strips: None) -> None:
    """Padding of a block's tails must not multiply what lies beside it."""
    for inputs in (33, 64, 70):
        x_RI, weight_EOI = rand(20, inputs, dtype=dtype), rand(2, 21, inputs, dtype=dtype)
        x_RI[3], x_RI[11] = torch.nan, torch.inf
        y_RO = native.grouped_linear(x_RI, weight_EOI, offsets_of([9, 11]))
        clean = [row for row in range(20) if row not in (3, 11)]
        assert y_RO[clean].isfinite().all() and not y_RO[3].isfinite().any() and not y_RO[11].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_with_many_rows_may_go_to_the_library(
    dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_LIBRARY_ROWS", {(isa, dtype): 7})
    calls: list[object] = []
    plain = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: calls.append(args) or plain(*args, **kwargs))
    rows, offsets = 15, offsets_of([3, 0, 12])
    x_RI, dy_RO, weight = rand(rows, 33, dtype=dtype), rand(rows, 18, dtype=dtype), rand(3, 18, 33, dtype=dtype)
    got = [
        native.grouped_linear(x_RI, weight, offsets),
        native.grouped_linear_input_grad(dy_RO, weight, offsets),
        native.grouped_linear_weight_grad(dy_RO, x_RI, offsets),
        native.grouped_gated(x_RI, weight, offsets)[0],
    ]
    assert len(calls) == 4
    wanted = [
        reference.grouped_linear(x_RI, weight, offsets),
        reference.grouped_linear_input_grad(dy_RO, weight, offsets),
        reference.grouped_linear_weight_grad(dy_RO, x_RI, offsets),
        reference.grouped_gated(x_RI, weight, offsets)[0],
    ]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2)
    assert "torch.mm" in native.describe()


def test_large_gradients_of_many_rows_may_go_to_the_library(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_LIBRARY_ROWS", {})
    monkeypatch.setattr(native, "_LIBRARY_GRAD_ROWS", {isa: 7})
    monkeypatch.setattr(native, "_LARGE_MATRIX", 18 * 33)
    calls: list[object] = []
    plain = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: calls.append(args) or plain(*args, **kwargs))
    offsets = offsets_of([3, 0, 12])
    for inputs, used in ((33, 1), (32, 0)):
        x_RI, dy_RO = rand(15, inputs), rand(15, 18, seed=1)
        calls.clear()
        dw_EOI = native.grouped_linear_weight_grad(dy_RO, x_RI, offsets)
        assert len(calls) == used
        check_product(reference.grouped_linear_weight_grad, dy_RO, x_RI, offsets, dw_EOI, 12)
        sum_EOI = dw_EOI.clone()
        native.add_grouped_linear_weight_grad(dy_RO, x_RI, offsets, sum_EOI, True)
        torch.testing.assert_close(sum_EOI, 2 * dw_EOI)
    assert "gradients of large weights native to 7 rows, then torch.mm" in native.describe()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: native.grouped_gated(torch.zeros(2, 3), torch.zeros(1, 5, 3), torch.tensor([0, 2])),
            "weight_EGI has an odd number of rows",
        ),
        (
            lambda: native.grouped_linear_input_grad(torch.zeros(2, 3), torch.zeros(1, 4, 5), torch.tensor([0, 2])),
            r"dy_RO has shape \[2, 3\]; it must be \[2, 4\]",
        ),
        (
            lambda: native.grouped_linear_weight_grad(torch.zeros(2, 3), torch.zeros(2, 5), torch.tensor([0, 1])),
            "offsets must rise from 0 to the number of rows, 2",
        ),
    ],
)
def test_wrong_inputs_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
