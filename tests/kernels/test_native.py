"""The compiled kernels against their definition, over the shapes, types and threads that break kernels.

T tokens, R rows sorted by expert, E experts, K choices, I inputs, O outputs, F expert inner, D hidden.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.kernels import reference

native = pytest.importorskip("moesaic.kernels.native", reason="the kernels were not built: no C++ compiler")
_native = native._native
pytestmark = pytest.mark.usefixtures("isa")

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [1, 7, 8, 15, 16, 17, 31, 33, 97]  # primes and 2N + 1 of every lane count
COUNTS = [[0, 0, 0], [0, 1, 0], [1, 0, 3, 2], [5, 0, 11], [1, 1, 1, 1], [40, 1, 0, 2]]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers whose memory starts one element past an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    numel = int(torch.Size(shape).numel())
    return torch.randn(numel + 1, generator=generator).to(dtype)[1:].view(shape)


def close(got: Tensor, wanted: Tensor) -> None:
    """Equal up to the rounding of fp32 sums, or one rounding to bf16 where they are kept in that."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    scale = max(float(wanted.float().abs().max()), 1e-6) if wanted.numel() else 1.0
    rtol = 2**-7 if wanted.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.float(), wanted.float(), rtol=rtol, atol=2e-6 * scale)


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])


def routed(num_tokens: int, top_k: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token_ids_R, row_ids_R, token_offsets, expert_offsets) of a random choice; some tokens have fewer rows."""
    generator = torch.Generator().manual_seed(num_tokens)
    expert_ids_TK = torch.randint(-1, num_experts, (num_tokens, top_k), generator=generator)
    token_ids_R, choice_R, expert_offsets = reference.sort_rows(expert_ids_TK, num_experts)
    row_ids_R = torch.argsort(token_ids_R * top_k + choice_R, stable=True)
    counts_T = torch.bincount(token_ids_R, minlength=num_tokens)
    return token_ids_R, row_ids_R, offsets_of(counts_T.tolist()), expert_offsets


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype, threads: int) -> None:
    for inner in SIZES:
        gate_up, dy = 4 * rand(3, 2 * inner, dtype=dtype), rand(3, inner, dtype=dtype, seed=1)
        close(native.silu_mul(gate_up), reference.silu_mul(gate_up))
        close(native.silu_mul_grad(dy, gate_up), reference.silu_mul_grad(dy, gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype, threads: int) -> None:
    for size in SIZES[1:]:  # the gradient of a row of one is what cancellation leaves
        for rows in (0, 1, 5):
            x, dy, weight = (
                rand(rows, size, dtype=dtype),
                rand(rows, size, dtype=dtype, seed=1),
                rand(size, dtype=dtype),
            )
            y, inverse = native.rms_norm(x, weight, 1e-6)
            wanted, wanted_inverse = reference.rms_norm(x, weight, 1e-6)
            close(y, wanted)
            close(inverse, wanted_inverse)
            for got, grad in zip(
                native.rms_norm_grad(dy, x, weight, inverse),
                reference.rms_norm_grad(dy, x, weight, wanted_inverse),
                strict=True,
            ):
                close(got, grad)


def test_silu_mul_of_extreme_gates() -> None:
    gates = torch.tensor([0.0, -0.0, 20.0, -20.0, 88.0, -88.0, 1e4, -1e4, torch.inf, torch.nan])
    gate_up = torch.cat([gates, torch.full_like(gates, 2.0)])[None]
    torch.testing.assert_close(
        native.silu_mul(gate_up), reference.silu_mul(gate_up), equal_nan=True, rtol=1e-5, atol=1e-30
    )


def test_bf16_rounds_to_nearest_even_and_keeps_nan() -> None:
    weights_R = torch.tensor([1.0, 1.00390625, 1.01171875, torch.nan, torch.inf, 3.4e38])
    ones = torch.ones(6, 5, dtype=torch.bfloat16)
    y_TD = native.combine_rows(ones, weights_R, torch.arange(6), torch.arange(7))
    torch.testing.assert_close(y_TD[:, 0], weights_R.to(torch.bfloat16), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(y_TD[:, 4], y_TD[:, 0], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_gather_and_combine(num_tokens: int, dtype: torch.dtype, threads: int) -> None:
    token_ids_R, row_ids_R, token_offsets, _ = routed(num_tokens, 3, 5)
    rows = token_ids_R.numel()
    weights_R = rand(rows, seed=2)
    for hidden in SIZES:
        x_TD, out_RD = rand(num_tokens, hidden, dtype=dtype), rand(rows, hidden, dtype=dtype, seed=1)
        assert torch.equal(native.gather_rows(x_TD, token_ids_R), reference.gather_rows(x_TD, token_ids_R))
        inputs = (out_RD, weights_R, row_ids_R, token_offsets)
        close(native.combine_rows(*inputs), reference.combine_rows(*inputs))
        gradients = native.combine_rows_grad(x_TD, out_RD, weights_R, token_ids_R)
        wanted = reference.combine_rows_grad(x_TD, out_RD, weights_R, token_ids_R)
        close(gradients[0], wanted[0])
        close(gradients[1], wanted[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_linear(counts: list[int], dtype: torch.dtype, threads: int) -> None:
    offsets = offsets_of(counts)
    for inputs, outputs in [(1, 1), (17, 5), (33, 13), (64, 97), (257, 31)]:
        x_RI = rand(sum(counts), inputs, dtype=dtype)
        weight_EOI = rand(len(counts), outputs, inputs, dtype=dtype, seed=1)
        close(native.grouped_linear(x_RI, weight_EOI, offsets), reference.grouped_linear(x_RI, weight_EOI, offsets))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("few", [5, 16, 99])
@pytest.mark.parametrize("inputs", [83, 512, 1031])
def test_a_row_does_not_depend_on_its_company(
    monkeypatch: pytest.MonkeyPatch, inputs: int, few: int, dtype: torch.dtype
) -> None:
    """Where weights are read in strips: all of k at once, in stretches, or in stretches for some rows at a time."""
    monkeypatch.setitem(native._FEW_ROWS, dtype, few)
    monkeypatch.setattr(native, "_LIBRARY_ROWS", {})
    x_RI, weight_EOI = rand(few, inputs, dtype=dtype), rand(1, 29, inputs, dtype=dtype, seed=1)
    together = native.grouped_linear(x_RI, weight_EOI, offsets_of([few]))
    close(together, reference.grouped_linear(x_RI, weight_EOI, offsets_of([few])))
    for row in range(few):
        alone = native.grouped_linear(x_RI[row : row + 1], weight_EOI, offsets_of([1]))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_bit_equal_on_any_number_of_threads(dtype: torch.dtype) -> None:
    """Sizes above the grain, so that both threads really work."""
    num_tokens, hidden, inner, top_k, num_experts = 301, 193, 131, 2, 7
    token_ids_R, row_ids_R, token_offsets, _ = routed(num_tokens, top_k, num_experts)
    rows = token_ids_R.numel()
    x_TD, out_RD = rand(num_tokens, hidden, dtype=dtype), rand(rows, hidden, dtype=dtype, seed=1)
    gate_up, weights_R = rand(rows, 2 * inner, dtype=dtype, seed=3), rand(rows, seed=2)
    weight_EOI, offsets = rand(5, 200, hidden, dtype=dtype, seed=4), offsets_of([1, 3, 0, 2, 4])
    scores_TE = rand(num_tokens, 64, seed=5)

    def everything() -> list[Tensor]:
        return [
            native.gather_rows(x_TD, token_ids_R),
            native.combine_rows(out_RD, weights_R, row_ids_R, token_offsets),
            *native.combine_rows_grad(x_TD, out_RD, weights_R, token_ids_R),
            native.silu_mul(gate_up),
            native.silu_mul_grad(gate_up[:, :inner], gate_up),
            *native.rms_norm(gate_up, gate_up[0], 1e-6),
            *native.rms_norm_grad(gate_up, gate_up, gate_up[0], gate_up[:, 0].float()),
            native.grouped_linear(x_TD[:10], weight_EOI, offsets),
            native.select_topk(scores_TE, 6),
        ]

    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(everything())
    torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@settings(max_examples=60)
@given(st.data())
def test_select_topk_agrees_on_ties_and_specials(data: st.DataObject) -> None:
    num_tokens, num_experts = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 40))
    top_k = data.draw(st.integers(1, num_experts))
    few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, float("inf"), float("-inf"), float("nan")])
    size = num_tokens * num_experts
    scores = data.draw(st.lists(st.one_of(few_values, st.floats(width=32)), min_size=size, max_size=size))
    scores_TE = torch.tensor(scores, dtype=torch.float32).view(num_tokens, num_experts)
    assert torch.equal(native.select_topk(scores_TE, top_k), reference.select_topk(scores_TE, top_k))


@settings(max_examples=60)
@given(st.data())
def test_sort_rows_agrees(data: st.DataObject) -> None:
    num_tokens, top_k, num_experts = (data.draw(st.integers(low, 9)) for low in (0, 1, 1))
    size = num_tokens * top_k
    ids = data.draw(st.lists(st.integers(-1, num_experts - 1), min_size=size, max_size=size))
    expert_ids_TK = torch.tensor(ids, dtype=torch.int64).view(num_tokens, top_k)
    got, wanted = native.sort_rows(expert_ids_TK, num_experts), reference.sort_rows(expert_ids_TK, num_experts)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_other_dtypes_and_layouts_are_served() -> None:
    gate_up = rand(3, 4, 10).double()
    assert torch.equal(native.silu_mul(gate_up), reference.silu_mul(gate_up))
    strided = rand(10, 6).T
    close(native.silu_mul(strided), reference.silu_mul(strided))
    assert native.silu_mul(rand(2, 0, 6)).shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native.silu_mul(torch.zeros(2, 5)), "odd last dimension"),
        (lambda: native.select_topk(torch.zeros(2, 3), 4), "more than there are experts"),
        (lambda: native.sort_rows(torch.tensor([[7]]), 4), "holds expert 7 of 4"),
        (lambda: native.gather_rows(torch.zeros(2, 3), torch.tensor([2])), "index outside 0 to 1"),
        (
            lambda: native.grouped_linear(torch.zeros(2, 3), torch.zeros(1, 4, 5), torch.tensor([0, 2])),
            r"weight_EOI has shape \[1, 4, 5\]; it must be \[\*, \*, 3\]",
        ),
        (
            lambda: native.grouped_linear(torch.zeros(2, 3), torch.zeros(1, 4, 3), torch.tensor([0, 1])),
            "offsets must rise from 0 to the number of rows, 2",
        ),
        (lambda: _native.silu_mul(torch.zeros(6, 2).T, torch.zeros(2, 3), 1), "not contiguous"),
        (lambda: _native.silu_mul(torch.zeros(2, 6).double(), torch.zeros(2, 3), 1), "use float32 or bfloat16"),
    ],
)
def test_wrong_inputs_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_one_openmp_serves_torch_and_us() -> None:
    torch.ones(1 << 16).sum()
    native.silu_mul(torch.ones(64, 2048))
    assert not native.ADDED_RUNTIMES


def test_an_unknown_instruction_set_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="cannot run here; use one of portable"):
        native._choose_isa("sse9")


@pytest.mark.parametrize(
    ("isa_name", "asked", "lines"), [("portable", None, 1), ("portable", "portable", 0), ("neon", None, 0)]
)
def test_plain_loops_that_nobody_asked_for_say_what_is_lost(
    isa_name: str, asked: str | None, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    native._tell_what_is_lost(isa_name, asked)
    said = capsys.readouterr().err
    assert said.count("\n") == lines and ("4 to 7 times as fast" in said) == bool(lines)
