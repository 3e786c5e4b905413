"""How the tensors of a file and the tensors of our modules correspond, as plain rules. No torch here.

The same map is read forwards to load and backwards to save, so a round trip cannot disagree with itself.
"""

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest

from moesaic.tensor_spec import TensorSpec

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor of a file, and the part of our tensor that it fills: `ours[index] = file[file_index]`.

    Both are what one would write in brackets: () for all of it, (e,) for one expert, (e, slice(0, F)) for its gate
    rows. Slices have step 1; only those of a file may be interleaved, as slice(0, None, 2) and slice(1, None, 2), which
    always run through the whole dimension.
    transposed: the file's part has the two last dimensions the other way round: `ours[index] = file[file_index].mT`.
    is_copy: another piece gives the same; it is written again, and where a file has it, must be equal.

    Three projections in one matrix:    Piece("Wqkv.weight", file_index=(slice(0, Q),)) for q; k and v alike
    Stacked, transposed, interleaved:   Piece("gate_up_proj", (slice(None), slice(0, F)),
                                              (slice(None), slice(None), slice(0, None, 2)), transposed=True) for gate
    """

    name: str
    index: Index = ()
    file_index: Index = ()
    transposed: bool = False
    is_copy: bool = False


WeightMap = dict[str, tuple[Piece, ...]]


def without_absent_copies(weight_map: WeightMap, names: Container[str]) -> WeightMap:
    """The map of files that hold these names, in which copies may be left out."""
    return {
        name: tuple(piece for piece in pieces if not piece.is_copy or piece.name in names)
        for name, pieces in weight_map.items()
    }


def piece_shape(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
    """The shape of `tensor[index]` for a tensor of `shape`."""
    kept = [len(range(*at.indices(size))) for size, at in zip(shape, index, strict=False) if isinstance(at, slice)]
    return (*kept, *shape[len(index) :])


def file_shapes(tensors: Iterable[TensorSpec], weight_map: WeightMap) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a file of this model holds, in the order of our tensors.

    A tensor of which the map names several parts reaches as far as the furthest of them.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in tensors:
        for piece in weight_map[spec.name]:
            own = _file_shape(spec.shape, piece)
            known = shapes.get(piece.name, ())
            shapes[piece.name] = tuple(max(sizes) for sizes in zip_longest(known, own, fillvalue=0))
    return shapes


def _file_shape(shape: tuple[int, ...], piece: Piece) -> tuple[int, ...]:
    """The smallest tensor of a file that this piece can be a part of."""
    part = list(_part_shape(shape, piece))
    sizes: list[int] = []
    for at in piece.file_index:
        if not isinstance(at, slice):
            sizes.append(at + 1)
            continue
        size = part.pop(0)
        sizes.append(size * (at.step or 1) if at.stop is None else at.stop)
    return (*sizes, *part)


def _part_shape(shape: tuple[int, ...], piece: Piece) -> tuple[int, ...]:
    """The shape of `file[file_index]`."""
    part = piece_shape(shape, piece.index)
    return (*part[:-2], part[-1], part[-2]) if piece.transposed else part


def check_weight_map(tensors: Iterable[TensorSpec], weight_map: WeightMap) -> None:
    """Assert that pieces tile every tensor exactly, ours and those of the files, and have one shape on both sides."""
    specs = list(tensors)
    assert {spec.name for spec in specs} == weight_map.keys(), "the map and the model name different tensors"
    for spec in specs:
        indices = [piece.index for piece in weight_map[spec.name] if not piece.is_copy]
        assert _tiles(spec.shape, indices), f"the pieces of {spec.name} do not tile {spec.shape}"
    of_file: dict[str, list[Index]] = {}
    for pieces in weight_map.values():
        for piece in pieces:
            of_file.setdefault(piece.name, []).append(piece.file_index)
    shapes = file_shapes(specs, weight_map)
    twice = [name for name, indices in of_file.items() if not _tiles(shapes[name], indices)]
    assert not twice, f"named twice, or in part: {twice[:3]}"
    for spec in specs:
        for piece in weight_map[spec.name]:
            filled, part = _part_shape(spec.shape, piece), piece_shape(shapes[piece.name], piece.file_index)
            assert filled == part, f"{piece.name} gives {part} where {spec.name} takes {filled}"


def _tiles(shape: tuple[int, ...], indices: Sequence[Index]) -> bool:
    """Whether every cell of the grid that the parts' edges draw is covered exactly once."""
    if list(indices) == [()]:
        return True
    boxes = [_box(shape, index) for index in indices]
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


def _box(shape: tuple[int, ...], index: Index) -> list[tuple[int, int]]:
    """Where a part begins and ends in each dimension; interleaved parts as if they stood one behind the other."""
    box: list[tuple[int, int]] = []
    for dim, size in enumerate(shape):
        at = index[dim] if dim < len(index) else slice(None)
        if not isinstance(at, slice):
            box.append((at, at + 1))
        elif at.step in (None, 1):
            box.append((0 if at.start is None else at.start, size if at.stop is None else at.stop))
        else:
            assert at.stop is None and size % at.step == 0, f"{at} of {size} does not run through the whole dimension"
            width = size // at.step
            box.append((at.start * width, (at.start + 1) * width))
    return box
