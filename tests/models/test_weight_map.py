"""The rules between our tensors and those of files."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.models.weight_map import Piece, check_weight_map, file_shapes, piece_shape
from moesaic.tensor_spec import TensorSpec

GATE_UP = TensorSpec("gate_up", (3, 10, 4), "experts")
HALVES = [slice(0, 5), slice(5, 10)]


def experts(ids: range) -> tuple[Piece, ...]:
    return tuple(Piece(f"{e}.{half.start}", (e, half)) for e in ids for half in HALVES)


def test_pieces_that_tile() -> None:
    check_weight_map([GATE_UP], {"gate_up": experts(range(3))})
    check_weight_map([GATE_UP], {"gate_up": (Piece("all"),)})
    assert file_shapes([GATE_UP], {"gate_up": experts(range(3))})["1.5"] == (5, 4)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (experts(range(2)), "do not tile"),
        ((*experts(range(3)), Piece("again", (0, slice(0, 5)))), "do not tile"),
        (experts(range(4)), "do not tile"),
        ((*experts(range(2)), Piece("2", (2, slice(0, 11)))), "do not tile"),
        ((*experts(range(2)), Piece("0.0", (2,))), "named twice: .'0.0'"),
    ],
)
def test_gaps_overlaps_and_double_names_are_found(pieces: tuple[Piece, ...], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_weight_map([GATE_UP], {"gate_up": pieces})


def test_a_map_names_exactly_the_models_tensors() -> None:
    with pytest.raises(AssertionError, match="different tensors"):
        check_weight_map([GATE_UP], {"gate_up": (Piece("a"),), "down": (Piece("b"),)})


@st.composite
def shapes_and_indices(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int | slice, ...]]:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    index: list[int | slice] = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        start = draw(st.integers(0, size - 1))
        index.append(draw(st.sampled_from([start, slice(start, draw(st.integers(start + 1, size))), slice(None)])))
    return tuple(shape), tuple(index)


@given(shapes_and_indices())
def test_shapes_are_those_that_torch_gives(case: tuple[tuple[int, ...], tuple[int | slice, ...]]) -> None:
    shape, index = case
    assert piece_shape(shape, index) == tuple(torch.empty(shape, device="meta")[index].shape)
