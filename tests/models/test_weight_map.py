"""The rules between our tensors and those of files."""

import dataclasses

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
        ((*experts(range(2)), Piece("0.0", (2,))), "named twice, or in part: .'0.0'"),
    ],
)
def test_gaps_overlaps_and_double_names_are_found(pieces: tuple[Piece, ...], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_weight_map([GATE_UP], {"gate_up": pieces})


FUSED = [TensorSpec(name, (rows, 4), "attention") for name, rows in (("q", 6), ("k", 2))]
ROWS = {"q": (Piece("qk", file_index=(slice(0, 6),)),), "k": (Piece("qk", file_index=(slice(6, 8),)),)}
ALL = slice(None)
INTERLEAVED = tuple(
    Piece("both", (ALL, half), (ALL, ALL, slice(odd, None, 2)), transposed=True) for odd, half in enumerate(HALVES)
)


def test_a_tensor_of_a_file_may_be_in_parts() -> None:
    check_weight_map(FUSED, ROWS)
    assert file_shapes(FUSED, ROWS) == {"qk": (8, 4)}


def test_a_tensor_of_a_file_may_be_transposed_and_interleaved() -> None:
    check_weight_map([GATE_UP], {"gate_up": INTERLEAVED})
    assert file_shapes([GATE_UP], {"gate_up": INTERLEAVED}) == {"both": (3, 4, 10)}
    whole = (Piece("whole", transposed=True),)
    check_weight_map([GATE_UP], {"gate_up": whole})
    assert file_shapes([GATE_UP], {"gate_up": whole}) == {"whole": (3, 4, 10)}


def test_an_expert_may_be_rows_of_one_matrix() -> None:
    pieces = tuple(Piece("rows", (e,), (slice(4 * e, 4 * e + 4),), transposed=True) for e in range(3))
    check_weight_map([GATE_UP], {"gate_up": pieces})
    assert file_shapes([GATE_UP], {"gate_up": pieces}) == {"rows": (12, 10)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((slice(0, 6), slice(7, 9)), "named twice, or in part: .'qk'"),
        ((slice(0, 6), slice(5, 7)), "named twice, or in part: .'qk'"),
        ((slice(0, 6), slice(6, 9)), r"qk gives .3, 4. where k takes .2, 4."),
        ((slice(0, 6), ALL), "named twice, or in part: .'qk'"),
    ],
)
def test_gaps_and_overlaps_in_a_file_are_found(rows: tuple[slice, slice], message: str) -> None:
    cut = {name: (Piece("qk", file_index=(part,)),) for name, part in zip("qk", rows, strict=True)}
    with pytest.raises(AssertionError, match=message):
        check_weight_map(FUSED, cut)


def test_the_same_half_twice_is_found() -> None:
    gate, up = INTERLEAVED
    with pytest.raises(AssertionError, match=r"in part: \['both'\]"):
        check_weight_map([GATE_UP], {"gate_up": (gate, dataclasses.replace(up, file_index=gate.file_index))})


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
