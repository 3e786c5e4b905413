"""A model's tensors as they would be, box by box, wherever the pieces of them lie."""

from collections import defaultdict
from typing import NamedTuple

from torch import Tensor

from moesaic.hub.parts import Box, overlap, region
from moesaic.hub.stored import Tensors
from moesaic.models.weight_map import Piece, WeightMap
from moesaic.tensor_spec import TensorSpec


class Part(NamedTuple):
    """A piece of one of our tensors."""

    spec: TensorSpec
    piece: Piece


class Values:
    """Reads boxes of our tensors from a source, none of which is ever whole in memory."""

    def __init__(self, source: Tensors, weight_map: WeightMap) -> None:
        self._source = source
        self._pieces = {name: _by_expert(pieces) for name, pieces in weight_map.items()}

    def read_into(self, out: Tensor, spec: TensorSpec, box: Box) -> None:
        """Fill `out` with `tensor[box]`, whatever its dtype."""
        for piece in self._near(spec, box):
            tensor = self._source.tensors[piece.name]
            met = overlap(spec.shape, box, piece, tensor.shape)
            if met is None:
                continue
            # What an index names by a number has no dimension in the file's part.
            numbers = tuple(0 if isinstance(at, int) else slice(None) for at in piece.index)
            part = out[met.ours][numbers]
            self._source.read_into(part.mT if piece.transposed else part, piece.name, met.file_index)

    def _near(self, spec: TensorSpec, box: Box) -> list[Piece]:
        """The pieces that may meet a box: of thousands of experts only those in it."""
        pieces = self._pieces[spec.name]
        if None in pieces:
            return [piece for group in pieces.values() for piece in group]
        return [piece for expert in range(*box[0]) for piece in pieces[expert]]


def _by_expert(pieces: tuple[Piece, ...]) -> dict[int | None, list[Piece]]:
    """Pieces by the first number of their index, None for those that begin with a slice. Copies add nothing."""
    groups: dict[int | None, list[Piece]] = defaultdict(list)
    for piece in pieces:
        if piece.is_copy:
            continue
        first = piece.index[0] if piece.index else None
        groups[first if isinstance(first, int) else None].append(piece)
    return groups


def fill(out: Tensor, box: Box, file_shape: tuple[int, ...], part: Part, values: Values) -> None:
    """Fill what `part` makes up of a box of a file's tensor; `out` is the whole box."""
    found = region(part.spec.shape, part.piece, file_shape, box)
    if found is None:
        return
    target = out[found.out]
    target = target.mT if part.piece.transposed else target
    # Our boxes keep a dimension of size 1 where an index has a number.
    numbers = tuple(None if isinstance(at, int) else slice(None) for at in part.piece.index)
    values.read_into(target[numbers], part.spec, found.ours)
