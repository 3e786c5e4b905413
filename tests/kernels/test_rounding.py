"""Rounding to whole numbers: its bounds, its fixed points, and that it is no worse than the plainest way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.kernels.rounding import dequantized, round_to_ints


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 200)),
    group=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_eight_bits_are_off_by_half_a_step_at_most(shape, group, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
    rounded = round_to_ints(weight, 8, group)
    assert rounded.values.shape == shape and rounded.scales.shape == (*shape[:2], -(-shape[2] // group))
    step = rounded.scales.float().repeat_interleave(group, dim=-1)[..., : shape[2]]
    assert bool(((dequantized(rounded, group) - weight).abs() <= 0.5 * step * (1 + 1e-5)).all())


@pytest.mark.parametrize("group", [32, 128])
def test_four_bits_lose_less_than_by_the_largest_magnitude_alone(group):
    weight = torch.randn(7, 3, 257, generator=torch.Generator().manual_seed(1))
    groups = torch.nn.functional.pad(weight, (0, -257 % group)).unflatten(-1, (-1, group))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (largest / -8).half().float()
    plain = (groups / scales).round().clamp(-8, 7) * scales
    plain_error = (plain - groups).square().sum(-1)
    rounded = dequantized(round_to_ints(weight, 4, group), group)
    errors = torch.nn.functional.pad(rounded - weight, (0, -257 % group)).unflatten(-1, (-1, group)).square().sum(-1)
    assert bool((errors <= plain_error * (1 + 1e-5)).all())
    assert errors.sum() < 0.95 * plain_error.sum()


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_what_was_rounded_stays(bits):
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    once = dequantized(round_to_ints(weight, bits, 32), 32)
    torch.testing.assert_close(dequantized(round_to_ints(once, bits, 32), 32), once, rtol=1e-3, atol=1e-4)


def test_zeros_and_what_is_too_large_for_half_floats():
    weight = torch.zeros(2, 64)
    weight[1, 3] = 1e9
    for bits in (4, 6, 8):
        rounded = dequantized(round_to_ints(weight, bits, 32), 32)
        assert torch.equal(rounded[0], torch.zeros(64)) and rounded.isfinite().all()
        assert rounded[1, 3] > 5e5
