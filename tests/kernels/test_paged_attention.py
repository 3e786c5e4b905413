"""Attention over a paged cache against its definition, and a token's bits whatever shares the step with it.

T tokens, S sequences, W blocks of a table, H heads, G key/value heads, A a key's numbers, V a value's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.kernels import reference
from moesaic.kernels.attention import attention
from moesaic.kernels.paged import CACHE_FORMATS, CacheFormat, PagedCache, PagedTokens, paged_cache, round_numbers

native = pytest.importorskip("moesaic.kernels.native", reason="the kernels were not built: no C++ compiler")
_native = native._native

FORMATS = CACHE_FORMATS


class Shape(NamedTuple):
    heads: int
    groups: int
    key_dim: int
    value_dim: int
    shared: bool = False


SHAPES = [
    Shape(16, 4, 64, 64),
    Shape(5, 5, 5, 7),  # a head each, and no whole vector
    Shape(6, 2, 24, 40),
    Shape(70, 1, 8, 16),  # more heads of a group than are taken together
    Shape(12, 1, 96, 80, shared=True),
    Shape(3, 1, 41, 33, shared=True),
]
SIGHTS = [{}, {"window": 7}, {"window": 45}, {"chunk": 20}, {"chunk": 50}, {"sinks": True}]
LENGTHS = (1, 33, 31, 97, 32)


@contextmanager
def using(isa: str) -> Iterator[None]:
    before = _native.isa()
    assert _native.use_isa(isa)
    try:
        yield
    finally:
        _native.use_isa(before)


class Step(NamedTuple):
    """Tokens and what they bring."""

    tokens: PagedTokens
    q_THA: Tensor
    k_TGA: Tensor
    v_TGV: Tensor | None

    def part(self, rows: Tensor | slice) -> "Step":
        positions_T, sequence_of_T, tables_SW = self.tokens
        tokens = PagedTokens(positions_T[rows].contiguous(), sequence_of_T[rows].contiguous(), tables_SW)
        return Step(tokens, self.q_THA[rows], self.k_TGA[rows], None if self.v_TGV is None else self.v_TGV[rows])


def step(shape: Shape, lengths: Sequence[int]) -> Step:
    """Whole sequences of these lengths, one after the other; their blocks lie in no order, and one more each."""
    generator = torch.Generator().manual_seed(sum(lengths) + shape.key_dim)
    width = -(-max(lengths, default=1) // 32) + 1
    tables_SW = torch.randperm(len(lengths) * width, generator=generator).view(-1, width).int()
    positions_T = torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.arange(0)
    sequence_of_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64)).int()

    def random(heads: int, size: int) -> Tensor:
        return torch.randn(len(positions_T), heads, size, generator=generator)

    q_THA, k_TGA = random(shape.heads, shape.key_dim), random(shape.groups, shape.key_dim)
    v_TGV = None if shape.shared else random(shape.groups, shape.value_dim)
    return Step(PagedTokens(positions_T, sequence_of_T, tables_SW), q_THA, k_TGA, v_TGV)


def poisoned_cache(shape: Shape, tables_SW: Tensor, format: CacheFormat) -> PagedCache:
    """Whoever looks at what nobody wrote becomes NaN."""
    _, groups, key_dim, value_dim, shared = shape
    paged = paged_cache(max(tables_SW.numel(), 1), groups, key_dim, value_dim, format=format, shared=shared)
    for part in (paged.keys, paged.values):
        if part is not None:
            part.view(torch.uint8).fill_(255)
    return paged


def sight_of(shape: Shape, sight: dict[str, Any]) -> dict[str, Any]:
    settings_ = {**sight, "scale": shape.key_dim**-0.5}
    if settings_.pop("sinks", False):
        settings_["sinks_H"] = torch.linspace(-2, 6, shape.heads)
    return settings_


def run(paged: PagedCache, part: Step, **sight: Any) -> Tensor:
    native.write_cache(paged, part.tokens, part.k_TGA, part.v_TGV)
    return native.paged_attention(part.q_THA, paged, part.tokens, **sight)


def whole(shape: Shape, whole_step: Step, format: CacheFormat, **sight: Any) -> Tensor:
    return run(poisoned_cache(shape, whole_step.tokens.tables_SW, format), whole_step, **sight)


@cache
def defined(
    shape: Shape, lengths: tuple[int, ...], format: CacheFormat, sight: tuple[tuple[str, Any], ...]
) -> tuple[PagedCache, Tensor]:
    """What the definition, in fp64, makes of whole sequences of these lengths."""
    steps = step(shape, lengths)
    paged = poisoned_cache(shape, steps.tokens.tables_SW, format)
    reference.write_cache(paged, steps.tokens, steps.k_TGA, steps.v_TGV)
    return paged, reference.paged_attention(steps.q_THA.double(), paged, steps.tokens, **sight_of(shape, dict(sight)))


def assert_is_defined(shape: Shape, lengths: tuple[int, ...], format: CacheFormat, sight: dict[str, Any]) -> None:
    """Sums of fp32 products, in another order than fp64 ones; probabilities as exact as exp (2 units) and scores are.

    Both look at the same rounded cache, so that the bound is one of fp32 for bf16, too.
    """
    steps = step(shape, lengths)
    ours = poisoned_cache(shape, steps.tokens.tables_SW, format)
    theirs, wanted = defined(shape, lengths, format, tuple(sight.items()))
    got, places = run(ours, steps, **sight_of(shape, sight)), steps.tokens.places()
    assert torch.equal(ours.keys_at(*places), theirs.keys_at(*places))
    assert torch.equal(ours.values_at(*places), theirs.values_at(*places))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_its_definition(shape: Shape, format: CacheFormat, isa: str) -> None:
    sights = SIGHTS if shape.key_dim == 24 or shape.key_dim == 41 else SIGHTS[::3]
    for sight in sights:
        assert_is_defined(shape, LENGTHS if shape.heads < 16 else (33, 40), format, sight)


@settings(max_examples=40)
@given(st.data())
def test_all_sizes(data: st.DataObject) -> None:
    small = st.integers(1, 20)
    shared = data.draw(st.booleans())
    groups = 1 if shared else data.draw(st.integers(1, 3))
    key_dim = data.draw(small)
    value_dim = data.draw(st.integers(1, key_dim) if shared else small)
    shape = Shape(groups * data.draw(st.integers(1, 15)), groups, key_dim, value_dim, shared)
    lengths = tuple(data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=3)))
    sight = data.draw(
        st.one_of(
            st.builds(dict, window=st.integers(1, 80)),
            st.builds(dict, chunk=st.integers(1, 80)),
            st.builds(dict, sinks=st.booleans()),
        )
    )
    with using(data.draw(st.sampled_from(_native.available_isas()))):
        assert_is_defined(shape, lengths, data.draw(st.sampled_from(FORMATS)), sight)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_has_the_same_bits_whatever_shares_its_step(shape: Shape, format: CacheFormat, isa: str) -> None:
    sights = SIGHTS[1::2] if shape.key_dim == 24 else SIGHTS[2::3]
    for sight in sights:
        settings_ = sight_of(shape, sight)
        steps = step(shape, LENGTHS)
        together = whole(shape, steps, format, **settings_)
        ends = torch.tensor(LENGTHS).cumsum(0)
        # Sequence by sequence, from the last one; each in pieces of many tokens and of one.
        paged = poisoned_cache(shape, steps.tokens.tables_SW, format)
        for end, length in reversed(list(zip(ends.tolist(), LENGTHS, strict=True))):
            start, cuts = end - length, [0, 1, 6, 24, 70, 95, 96]
            for first, last in zip(cuts, [*cuts[1:], length], strict=True):
                rows = slice(start + min(first, length), start + min(last, length))
                assert torch.equal(run(paged, steps.part(rows), **settings_), together[rows])
        # Everything is written: rows in any order, and again.
        order = torch.randperm(len(together), generator=torch.Generator().manual_seed(1))[:60]
        shuffled = steps.part(order)
        assert torch.equal(native.paged_attention(shuffled.q_THA, paged, shuffled.tokens, **settings_), together[order])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4]])
def test_bits_do_not_depend_on_threads(shape: Shape, format: CacheFormat, isa: str) -> None:
    prompts, settings_ = step(shape, [97, 64]), sight_of(shape, {})
    rows = prompts.part(torch.tensor([160, 96]))  # few items: heads are split between threads
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            paged = poisoned_cache(shape, prompts.tokens.tables_SW, format)
            found.append((run(paged, prompts, **settings_), run(paged, rows, **settings_)))
    finally:
        torch.set_num_threads(before)
    for all_rows, two_rows in found[1:]:
        assert torch.equal(all_rows, found[0][0]) and torch.equal(two_rows, found[0][1])
    assert torch.equal(found[0][1], found[0][0][[160, 96]])


@pytest.mark.parametrize("format", FORMATS[1:])
def test_a_long_context_on_any_number_of_threads(format: CacheFormat, isa: str) -> None:
    """Long enough that a single token is worth several threads."""
    shape = Shape(12, 1, 288, 256, shared=True)
    sequence, settings_ = step(shape, [1500]), sight_of(shape, {})
    paged = poisoned_cache(shape, sequence.tokens.tables_SW, format)
    native.write_cache(paged, sequence.tokens, sequence.k_TGA, None)
    last, before, found = sequence.part(slice(1499, 1500)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(native.paged_attention(last.q_THA, paged, last.tokens, **settings_))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    wanted = reference.paged_attention(last.q_THA.double(), paged, last.tokens, **settings_)
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["fp32", "int8"])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[5]])
def test_what_is_not_a_number_stays_with_its_token(shape: Shape, format: CacheFormat, isa: str) -> None:
    steps, settings_ = step(shape, [40, 50]), sight_of(shape, {})
    clean = whole(shape, steps, format, **settings_)
    for poison in (float("nan"), float("inf")):
        q_THA = steps.q_THA.clone()
        q_THA[17, shape.heads - 1, 3] = poison
        out = whole(shape, steps._replace(q_THA=q_THA), format, **settings_)
        assert out[17, -1].isnan().all()
        out[17, -1] = clean[17, -1]
        assert torch.equal(out, clean)
    k_TGA = steps.k_TGA.clone()
    k_TGA[17, 0] = float("nan")
    out = whole(shape, steps._replace(k_TGA=k_TGA), format, **settings_)
    seen = torch.arange(90)
    later = (seen >= 17) & (seen < 40)
    assert out[later, 0].isnan().all() and torch.equal(out[~later], clean[~later])


def test_keys_and_values_are_rounded_as_torch_rounds(isa: str) -> None:
    shape = Shape(2, 2, 19, 21)
    steps = step(shape, [45])
    assert steps.v_TGV is not None
    steps.v_TGV[3, 0, :4] = torch.tensor([1e-40, -1e-40, 3.3961e38, 1.00390625])  # below normal, to infinity, a tie
    paged = poisoned_cache(shape, steps.tokens.tables_SW, "bf16")
    native.write_cache(paged, steps.tokens, steps.k_TGA, steps.v_TGV)
    places = steps.tokens.places()
    assert torch.equal(paged.keys_at(*places), steps.k_TGA.bfloat16())
    assert torch.equal(paged.values_at(*places), steps.v_TGV.bfloat16())


@settings(max_examples=60)
@given(
    size=st.integers(1, 100),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 1.0, 8.0]),  # of powers of e: numbers next to each other, or worlds apart
    shared=st.booleans(),
)
def test_8_bits_are_off_by_half_a_scale_at_most(size: int, seed: int, spread: float, shared: bool) -> None:
    shape, generator = Shape(1, 1, size, size, shared), torch.Generator().manual_seed(seed)
    steps = step(shape, [37])
    x_TGA = (
        torch.randn(37, 1, size, generator=generator) * (torch.randn(37, 1, size, generator=generator) * spread).exp()
    )
    scales_TGC = torch.stack([part.abs().amax(-1) for part in x_TGA.split(32, dim=-1)], -1) / 127
    half_TGA = scales_TGC.bfloat16().double().repeat_interleave(32, dim=-1)[..., :size] / 2
    for isa in _native.available_isas():
        with using(isa):
            paged = poisoned_cache(shape, steps.tokens.tables_SW, "int8")
            native.write_cache(paged, steps.tokens, x_TGA, None if shared else x_TGA.flip(0))
        keys, values = (at(*steps.tokens.places()) for at in (paged.keys_at, paged.values_at))
        # Quotients are rounded to fp32 before they are rounded to whole numbers of up to 127.
        assert ((keys.double() - x_TGA).abs() <= half_TGA * (1 + 2**-16)).all()
        assert torch.equal(values, keys if shared else keys.flip(0))


def test_8_bits_keep_the_least_and_the_most(isa: str) -> None:
    """The highest number is as exact as a scale in bf16; zeros, and what is too small for a scale, are zeros."""
    shape = Shape(1, 1, 33, 4)
    steps = step(shape, [6])
    assert steps.v_TGV is not None
    steps.k_TGA[:] = torch.tensor([0.0, 3.4e38, 1e-30, 1e-44, -127.0, float("-inf")])[:, None, None]
    steps.k_TGA[1:, 0, 1:32] = 0.0
    paged = poisoned_cache(shape, steps.tokens.tables_SW, "int8")
    native.write_cache(paged, steps.tokens, steps.k_TGA, steps.v_TGV)
    keys_TA = paged.keys_at(*steps.tokens.places())[:, 0]
    assert torch.equal(keys_TA[[0, 3]], torch.zeros(2, 33))
    torch.testing.assert_close(keys_TA[[1, 2, 4]], steps.k_TGA[[1, 2, 4], 0], rtol=2**-8, atol=0)
    assert keys_TA[5].isnan().all()  # loud, and no other number of a text


@pytest.mark.parametrize("shape", [Shape(8, 2, 64, 64), Shape(6, 2, 24, 40), Shape(8, 1, 96, 64, shared=True)])
def test_attention_to_8_bits_stays_within_what_the_format_allows(shape: Shape, isa: str) -> None:
    """With scores off by e at most, probabilities are off by a factor of exp(2 e), and outputs by that of the largest
    value and by what values are off; a score is off by half a scale for each of the query's numbers."""
    steps, settings_ = step(shape, [70]), sight_of(shape, {})
    v_TGV = steps.k_TGA[..., : shape.value_dim] if steps.v_TGV is None else steps.v_TGV
    exact = whole(shape, steps, "fp32", **settings_).double()
    got = whole(shape, steps, "int8", **settings_).double()
    shared_by = shape.heads // shape.groups
    k_off, v_off = ((_rounded(x) - x).abs().double().repeat_interleave(shared_by, 1) for x in (steps.k_TGA, v_TGV))
    for token in range(70):
        q_HA, seen = steps.q_THA[token].abs().double(), slice(0, token + 1)
        score_off_H = torch.einsum("ha,nha->nh", q_HA, k_off[seen]).amax(0) * settings_["scale"]
        largest_H = v_TGV[seen].abs().double().amax((0, 2)).repeat_interleave(shared_by)
        allowed_H = (2 * score_off_H).expm1() * largest_H + v_off[seen].amax((0, 2)) + 1e-5
        assert ((got - exact)[token].abs().amax(-1) <= allowed_H).all()
    assert (got - exact).norm() < 0.01 * exact.norm()  # errors of either sign: far below the worst case


def _rounded(x_TGA: Tensor) -> Tensor:
    numbers, scales = round_numbers(x_TGA)
    return numbers * scales.float().repeat_interleave(32, dim=-1)[..., : x_TGA.shape[-1]]


def test_queries_keys_and_values_may_lie_in_one_row(isa: str) -> None:
    shape = SHAPES[2]
    steps, settings_ = step(shape, [50]), sight_of(shape, {})
    assert steps.v_TGV is not None
    parts = [steps.q_THA, steps.k_TGA, steps.v_TGV]
    fused = torch.cat([part.flatten(1) for part in parts], dim=1)
    pieces = fused.split([part.flatten(1).shape[1] for part in parts], dim=1)
    q, k, v = (piece.unflatten(1, part.shape[1:]) for piece, part in zip(pieces, parts, strict=True))
    assert not q.is_contiguous() and not v.is_contiguous()
    in_rows = whole(shape, Step(steps.tokens, q, k, v), "fp32", **settings_)
    assert torch.equal(in_rows, whole(shape, steps, "fp32", **settings_))


def test_nothing_to_do(isa: str) -> None:
    for shape in (SHAPES[0], SHAPES[5]):
        paged = poisoned_cache(shape, torch.zeros(1, 2), "fp32")
        assert run(paged, step(shape, []), **sight_of(shape, {})).shape == (0, shape.heads, shape.value_dim)


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_layers_attend_alike(sight: dict[str, Any]) -> None:
    """What moesaic.layers computes of a whole row with masks."""
    shape = Shape(6, 2, 24, 24)
    steps, settings_ = step(shape, [75]), sight_of(shape, sight)
    assert steps.v_TGV is not None
    at_S = torch.arange(75)
    ahead_SN = at_S[:, None] - at_S
    visible_SN = (ahead_SN >= 0) & (ahead_SN < settings_.get("window", 75))
    if "chunk" in settings_:
        visible_SN &= at_S[:, None] // settings_["chunk"] == at_S // settings_["chunk"]
    q, k, v = (part.transpose(0, 1)[None] for part in (steps.q_THA, steps.k_TGA, steps.v_TGV))
    wanted = attention(q, k, v, visible=visible_SN, scale=settings_["scale"], sinks_H=settings_.get("sinks_H"))
    got = whole(shape, steps, "fp32", **settings_)
    torch.testing.assert_close(got, wanted[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_latent_attention_absorbs_alike() -> None:
    """As LatentAttention does: latents beside turned keys are keys and values of one head, the latter cut off."""
    shape = Shape(5, 1, 40, 32, shared=True)
    steps = step(shape, [70])
    q_1HSA, both_11SA = steps.q_THA.transpose(0, 1)[None], steps.k_TGA.transpose(0, 1)[None]
    wanted = attention(q_1HSA, both_11SA, both_11SA, causal=True, scale=0.2)[..., :32]
    got = whole(shape, steps, "fp32", scale=0.2)
    torch.testing.assert_close(got, wanted[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_a_cache_of_other_numbers_is_the_references() -> None:
    shape = SHAPES[2]
    steps, settings_ = step(shape, [40]), sight_of(shape, {})
    wide = Step(steps.tokens, *(part.double() for part in steps[1:] if part is not None))
    got = whole(shape, wide, "fp32", **settings_)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), whole(shape, steps, "fp32", **settings_), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    shape = SHAPES[2]
    steps, settings_ = step(shape, [40]), sight_of(shape, {})
    paged = poisoned_cache(shape, steps.tokens.tables_SW, "fp32")
    native.write_cache(paged, steps.tokens, steps.k_TGA, steps.v_TGV)

    def attend(paged: PagedCache = paged, **changed: Tensor) -> Tensor:
        return native.paged_attention(steps.q_THA, paged, steps.tokens._replace(**changed), **settings_)

    positions_T, sequence_of_T, tables_SW = steps.tokens
    with pytest.raises(ValueError, match="positions_T holds 96; tables_SW reach to 95"):
        attend(positions_T=positions_T.clone().fill_(96))
    with pytest.raises(ValueError, match="positions_T holds -1"):
        attend(positions_T=positions_T - 1)
    with pytest.raises(ValueError, match="sequence_of_T holds a row that tables_SW has not"):
        attend(sequence_of_T=sequence_of_T + 1)
    with pytest.raises(ValueError, match="tables_SW name block 7 of 3"):
        attend(tables_SW=torch.full_like(tables_SW, 7))
    with pytest.raises(ValueError, match="values has shape"):
        attend(paged._replace(value_dim=8))
    with pytest.raises(ValueError, match="q_THA has 3 heads for 2 groups"):
        native.paged_attention(steps.q_THA[:, :3], paged, steps.tokens, **settings_)
    with pytest.raises(ValueError, match=r"k_TGA has shape \[40, 1, 24\]"):
        native.write_cache(paged, steps.tokens, steps.k_TGA[:, :1], steps.v_TGV)
    with pytest.raises(ValueError, match="v_TGV and values belong together"):
        native.write_cache(paged, steps.tokens, steps.k_TGA, None)


def test_a_cache_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="a cache in 'fp16'; use fp32, bf16, int8"):
        paged_cache(1, 1, 8, 8, format="fp16")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="2 shared key/value heads; a latent is one"):
        paged_cache(1, 2, 8, 8, format="fp32", shared=True)
    with pytest.raises(ConfigError, match="values of 9 numbers in keys of 8"):
        paged_cache(1, 1, 8, 9, format="fp32", shared=True)


def test_block_bytes() -> None:
    """As csrc/paged.h counts them: values, and a shared latent, fill whole sixteens."""
    assert paged_cache(2, 4, 64, 64, format="bf16").block_bytes == 4 * 32 * 128 * 2
    assert paged_cache(2, 2, 5, 7, format="fp32").block_bytes == 2 * 32 * (5 + 16) * 4
    assert paged_cache(2, 1, 40, 32, format="bf16", shared=True).block_bytes == 32 * 48 * 2
    assert paged_cache(2, 4, 64, 64, format="int8").block_bytes == 4 * 32 * 2 * (64 + 2 * 2)
    assert paged_cache(2, 2, 5, 7, format="int8").block_bytes == 2 * 32 * (5 + 2 + 16 + 2)
    assert paged_cache(2, 1, 40, 32, format="int8", shared=True).block_bytes == 32 * (48 + 2 * 2)
