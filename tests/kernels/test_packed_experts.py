"""The fused feed-forward over packed weights against its definition.

T tokens, R rows sorted by expert, E experts, K choices, D hidden, F expert inner.
"""

import pytest
import torch
from torch import Tensor

from moesaic.config.activation import Activation, ClampedSwiglu
from moesaic.kernels import reference
from moesaic.kernels.blocks import ExpertRows, PackedExperts, PackedMatrices
from tests.packed_kinds import KINDS, packed_and_weights

native = pytest.importorskip("moesaic.kernels.native", reason="the kernels were not built: no C++ compiler")
_native = native._native

E = 3
# hidden, inner: odd ones, less than a strip; whole strips and blocks of both; one more than them
SIZES = [(33, 5), (64, 128), (129, 97)]


def experts_of(
    kind: str, hidden: int, inner: int, *, paired: bool = True, activation: Activation = "silu", biased: bool = False
) -> PackedExperts:
    """Three experts with weights small enough that nothing grows out of proportion on the way."""
    into, _ = packed_and_weights(kind, 2 * inner if paired else inner, hidden, paired)
    down, _ = packed_and_weights(kind, hidden, inner, False)
    if not biased:
        return PackedExperts(into, down, activation)
    generator = torch.Generator().manual_seed(1)
    into_bias_EG = torch.randn(E, into.shape.outputs, generator=generator)
    return PackedExperts(into, down, activation, into_bias_EG, torch.randn(E, hidden, generator=generator))


def rows_of(expert_ids_TK: Tensor, *, weight_on_input: bool = False) -> ExpertRows:
    """Expert -1 means no row."""
    token_ids_R, choice_R, offsets = reference.sort_rows(expert_ids_TK, E)
    row_of_TK = torch.full_like(expert_ids_TK, -1)
    row_of_TK[token_ids_R, choice_R] = torch.arange(len(token_ids_R))
    weight_of_TK = 0.2 + 0.6 * torch.rand(expert_ids_TK.shape, generator=torch.Generator().manual_seed(2))
    return ExpertRows(offsets, weight_of_TK[token_ids_R, choice_R], row_of_TK, weight_on_input)


def chosen(tokens: int, idle: int | None = None) -> Tensor:
    """Two different experts a token; the first few drop their first choice, and nobody takes an idle one."""
    first = torch.randint(E, (tokens,), generator=torch.Generator().manual_seed(tokens))
    ids_TK = torch.stack((first, (first + 1) % E), dim=1)
    ids_TK[:2, 0] = -1
    return torch.where(ids_TK == idle, -1, ids_TK) if idle is not None else ids_TK


def tokens_of(count: int, hidden: int) -> Tensor:
    """Tokens three elements apart from each other, at a misaligned address."""
    whole = torch.randn(count * (hidden + 3) + 1, generator=torch.Generator().manual_seed(count))
    return whole[1:].view(count, hidden + 3)[:, :hidden]


def fed_forward(
    x_TD: Tensor, experts: PackedExperts, rows: ExpertRows | None, multiplier: float = 1.0, threads: int = 1
) -> Tensor:
    before, out_TD = torch.get_num_threads(), tokens_of(len(x_TD), x_TD.shape[1]).clone()
    try:
        torch.set_num_threads(threads)
        native.packed_experts(x_TD, experts, rows, out_TD, multiplier)
    finally:
        torch.set_num_threads(before)
    return out_TD


def assert_agrees(x_TD: Tensor, experts: PackedExperts, rows: ExpertRows | None, multiplier: float = 1.0) -> None:
    """Inner values that differ in their last bits may be rounded to neighbours: nearly all are not."""
    got = fed_forward(x_TD, experts, rows, multiplier)
    wanted = tokens_of(*x_TD.shape).clone()
    reference.packed_experts(x_TD, experts, rows, wanted, multiplier)
    if not len(x_TD):
        return
    error = (got - wanted).abs() / wanted.abs().amax()
    rounded = experts.down.shape.format != "fp32"
    assert float(error.max()) <= (2e-3 if rounded else 5e-6)
    assert float(error.median()) <= 5e-6


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_its_definition(kind: str, isa: str) -> None:
    for hidden, inner in SIZES:
        for paired in (True, False):
            experts = experts_of(kind, hidden, inner, paired=paired)
            for ids_TK in (chosen(0), chosen(1), chosen(5, idle=1), chosen(30)):
                assert_agrees(tokens_of(len(ids_TK), hidden), experts, rows_of(ids_TK))


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4/32", "mxfp4", "uneven4"])
def test_biases_clamps_weights_on_the_input_and_a_multiplier(kind: str, isa: str) -> None:
    x_TD, ids_TK = tokens_of(9, 129), chosen(9, idle=2)
    clamped = ClampedSwiglu(limit=0.5, alpha=1.702, shift=1.0)
    assert_agrees(x_TD, experts_of(kind, 129, 97, activation=clamped, biased=True), rows_of(ids_TK))
    assert_agrees(x_TD, experts_of(kind, 129, 97, biased=True), rows_of(ids_TK, weight_on_input=True), 0.25)
    assert_agrees(x_TD, experts_of(kind, 129, 97, paired=False, activation="gelu", biased=True), rows_of(ids_TK), -2.0)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "relu", "relu2"])
@pytest.mark.parametrize("paired", [True, False])
def test_every_activation(name: str, paired: bool, isa: str) -> None:
    assert_agrees(10 * tokens_of(7, 33), experts_of("fp32", 33, 37, paired=paired, activation=name), rows_of(chosen(7)))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8/64", "int4/128"])
def test_without_rows_it_is_a_dense_block(kind: str, isa: str) -> None:
    many = experts_of(kind, 64, 97, biased=True)
    into, down = (PackedMatrices(each.data[:1].contiguous(), each.shape) for each in (many.into, many.down))
    assert many.into_bias_EG is not None and many.down_bias_ED is not None
    one = PackedExperts(into, down, "silu", many.into_bias_EG[:1], many.down_bias_ED[:1])
    for tokens in (1, 7, 131):
        assert_agrees(tokens_of(tokens, 64), one, None, 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_has_the_same_bits_alone_and_in_company_on_any_threads(kind: str, isa: str) -> None:
    experts, ids_TK = experts_of(kind, 129, 97), chosen(150)
    x_TD, rows = tokens_of(150, 129), rows_of(chosen(150))
    together = fed_forward(x_TD, experts, rows)
    for threads in (2, 3, 8):
        assert torch.equal(fed_forward(x_TD, experts, rows, threads=threads), together)
    for some in (slice(3, 4), slice(149, 150), slice(7, 9), slice(20, 35), slice(40, 110)):
        part = rows_of(ids_TK[some])
        weights_TK = torch.zeros(ids_TK.shape)
        weights_TK[rows.row_of_TK >= 0] = rows.weights_R[rows.row_of_TK[rows.row_of_TK >= 0]]
        weights_R = torch.empty(len(part.weights_R))
        weights_R[part.row_of_TK[part.row_of_TK >= 0]] = weights_TK[some][part.row_of_TK >= 0]
        out_TD = tokens_of(150, 129)[some].clone()
        native.packed_experts(x_TD[some], experts, part._replace(weights_R=weights_R), out_TD)
        assert torch.equal(out_TD, together[some])


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8", "int8/32", "int4/32"])
def test_a_product_takes_a_bias_and_rows_apart_and_is_added(kind: str, isa: str) -> None:
    packed, _ = packed_and_weights(kind, 33, 129, False)
    x_RI, offsets = tokens_of(20, 129), torch.tensor([0, 1, 1, 20])
    bias_EO, sum_RO = torch.randn(E, 33, generator=torch.Generator().manual_seed(4)), torch.ones(20, 40)[:, :33]
    wanted = reference.packed_linear(x_RI, packed, offsets, bias_EO)
    assert torch.allclose(native.packed_linear(x_RI, packed, offsets, bias_EO), wanted, atol=1e-4, rtol=1e-5)
    native.add_packed_linear(x_RI, packed, offsets, sum_RO, 0.5, bias_EO)
    assert torch.allclose(sum_RO, 1 + 0.5 * wanted, atol=1e-4, rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    experts, x_TD = experts_of("fp32", 33, 5), tokens_of(2, 33)
    rows = rows_of(torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match="row_of_TK holds a row outside 0 to 1; -1 means none"):
        native.packed_experts(x_TD, experts, rows._replace(row_of_TK=torch.tensor([[0], [2]])), torch.zeros(2, 33))
    with pytest.raises(ValueError, match="offsets are missing; without them there is one expert"):
        native.packed_experts(x_TD, experts, None, torch.zeros(2, 33))
    with pytest.raises(ValueError, match="activation is not known; use silu, gelu, gelu_new, relu or relu2"):
        native.packed_experts(x_TD, experts._replace(activation="tanh"), rows, torch.zeros(2, 33))
