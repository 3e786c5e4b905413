"""Rounding to uneven values: near the best that its format can do, and the same when done again."""

import pytest
import torch
from torch import Tensor

from moesaic.kernels import uneven
from moesaic.kernels.rounding import dequantized as of_ints
from moesaic.kernels.rounding import round_to_ints
from moesaic.kernels.uneven import dequantized, round_to_codes


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_it_is_closer_than_even_steps_and_than_the_squares_of_all_scales_allow_by_little() -> None:
    weight = normal(64, 256) * 0.02
    found = error(dequantized(round_to_codes(weight)), weight)
    assert found < 0.84 * error(of_ints(round_to_ints(weight, 4, 32), 32), weight)
    assert found < 1.04 * error(best_of_all(weight), weight)


def best_of_all(weight: Tensor) -> Tensor:
    """Each group of 16 by itself with whichever of all scales of the format is best, whatever its neighbour has."""
    groups = weight.unflatten(-1, (-1, 16))
    magnitudes = torch.tensor([2.0**exponent * (1 + eighth / 8) for exponent in range(-16, -4) for eighth in range(8)])
    scales = torch.cat((magnitudes, -magnitudes)).view(-1, *[1] * groups.dim())
    off = groups[..., None] - scales[..., None] * uneven.VALUES  # [scales, ..., 16, values]
    nearest = uneven.VALUES[off.abs().argmin(-1)] * scales
    best = (nearest - groups).square().sum(-1, keepdim=True).argmin(0, keepdim=True).expand(1, *groups.shape)
    return nearest.gather(0, best)[0].flatten(-2)


@pytest.mark.parametrize("inputs", [1, 16, 31, 64, 100])
def test_again_it_stays(inputs: int) -> None:
    once = dequantized(round_to_codes(normal(33, inputs)))
    assert error(dequantized(round_to_codes(once)), once) < 0.02


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-7, 1.0, 3e7, 1e9])
def test_sizes_of_weights(size: float) -> None:
    """From 2^-27 to 2^35 a step; what is smaller becomes 0."""
    weight = normal(8, 64) * size
    found = dequantized(round_to_codes(weight))
    if size < 1e-20:
        assert bool((found == 0).all())
    else:
        assert error(found, weight) < 0.08


def test_a_block_of_which_a_number_is_not_finite() -> None:
    for poison in (float("nan"), float("inf"), float("-inf")):
        weight = normal(3, 96)
        weight[1, 40] = poison
        assert dequantized(round_to_codes(weight)).isnan().nonzero().tolist() == [[1, i] for i in range(32, 64)]


def test_the_table_leaves_room_for_four_products_in_16_bits() -> None:
    values = uneven.VALUES - uneven.VALUES.min()
    assert 4 * int(values.max()) * 127 < 2**15 and bool((values >= 0).all()) and uneven.VALUES[0] == 0
