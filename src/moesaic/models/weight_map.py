"""How the tensors of a file and the tensors of our modules correspond, as plain rules. No torch here.

The same map is read forwards to load and backwards to save, so a round trip cannot disagree with itself.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from moesaic.tensor_spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Piece:
    """One whole tensor of a file, and the part of our tensor that it fills.

    `index` is what one would write in brackets: () for all of it, (e,) for one expert, (e, slice(0, F)) for its gate
    rows. Slices have step 1.
    """

    name: str
    index: tuple[int | slice, ...] = ()


WeightMap = dict[str, tuple[Piece, ...]]


def piece_shape(shape: tuple[int, ...], index: tuple[int | slice, ...]) -> tuple[int, ...]:
    """The shape of `tensor[index]` for a tensor of `shape`."""
    kept = [len(range(*at.indices(size))) for size, at in zip(shape, index, strict=False) if isinstance(at, slice)]
    return (*kept, *shape[len(index) :])


def file_shapes(tensors: Iterable[TensorSpec], weight_map: WeightMap) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a file of this model holds, in the order of our tensors."""
    return {piece.name: piece_shape(spec.shape, piece.index) for spec in tensors for piece in weight_map[spec.name]}


def check_weight_map(tensors: Iterable[TensorSpec], weight_map: WeightMap) -> None:
    """Assert that the pieces of every tensor tile it exactly, and that no two pieces share a file name."""
    specs = list(tensors)
    assert {spec.name for spec in specs} == weight_map.keys(), "the map and the model name different tensors"
    for spec in specs:
        assert _tiles(spec.shape, weight_map[spec.name]), f"the pieces of {spec.name} do not tile {spec.shape}"
    names = Counter(piece.name for pieces in weight_map.values() for piece in pieces)
    twice = [name for name, count in names.items() if count > 1]
    assert not twice, f"named twice: {twice[:3]}"


def _tiles(shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> bool:
    """Whether every cell of the grid that the pieces' edges draw is covered exactly once."""
    boxes = [_box(shape, piece.index) for piece in pieces]
    if any(not 0 <= start < stop <= size for box in boxes for (start, stop), size in zip(box, shape, strict=True)):
        return False
    edges = [sorted({0, size, *(edge for box in boxes for edge in box[dim])}) for dim, size in enumerate(shape)]
    places = [{edge: place for place, edge in enumerate(axis)} for axis in edges]
    covered = Counter(
        cell
        for box in boxes
        for cell in product(*(range(at[start], at[stop]) for at, (start, stop) in zip(places, box, strict=True)))
    )
    num_cells = 1
    for axis in edges:
        num_cells *= len(axis) - 1
    return len(covered) == num_cells and all(count == 1 for count in covered.values())


def _box(shape: tuple[int, ...], index: tuple[int | slice, ...]) -> list[tuple[int, int]]:
    box: list[tuple[int, int]] = []
    for dim, size in enumerate(shape):
        at = index[dim] if dim < len(index) else slice(None)
        if isinstance(at, slice):
            box.append((0 if at.start is None else at.start, size if at.stop is None else at.stop))
        else:
            box.append((at, at + 1))
    return box
