"""Arithmetic on parts of tensors: what to read for a piece of ours, cut into boxes that fit in memory. No torch here.

A box says for every dimension where a part begins and ends; a cut is a box of a file's tensor with steps.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from moesaic.models.weight_map import Index, Piece

Box = tuple[tuple[int, int], ...]


class Overlap(NamedTuple):
    """What a piece gives to a box of our tensor: `ours`, counted from the box's begin, is the file's part."""

    ours: tuple[slice, ...]
    file_index: Index


def whole(shape: Sequence[int]) -> Box:
    """The box of everything."""
    return tuple((0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """The sizes of a box."""
    return tuple(stop - start for start, stop in box)


def slices(box: Box) -> tuple[slice, ...]:
    """A box as what one would write in brackets."""
    return tuple(slice(start, stop) for start, stop in box)


def boxes(shape: Sequence[int], max_elements: int, multiples: Sequence[int] = ()) -> Iterator[Box]:
    """Boxes that tile a tensor in the order of its bytes, each contiguous there and of at most about `max_elements`.

    multiples: every dimension is cut only at multiples of its own; a box may then be larger than asked.
    """
    steps = [max(1, size) for size in shape]
    aligned = [*multiples, *[1] * (len(shape) - len(multiples))]
    for dim, size in enumerate(shape):
        if math.prod(steps) <= max_elements:
            break
        room = max_elements // math.prod(shape[dim + 1 :])
        steps[dim] = min(size, max(room // aligned[dim], 1) * aligned[dim])
        if steps[dim] > 1:
            break
    starts = (range(0, size, step) for size, step in zip(shape, steps, strict=True))
    for corner in product(*starts):
        yield tuple((at, min(at + step, size)) for at, step, size in zip(corner, steps, shape, strict=True))


def box_of(shape: Sequence[int], index: Index) -> Box:
    """Where `tensor[index]` begins and ends in each dimension, steps aside."""
    box: list[tuple[int, int]] = []
    for dim, size in enumerate(shape):
        at = index[dim] if dim < len(index) else slice(None)
        start, stop, step = at.indices(size) if isinstance(at, slice) else (at, at + 1, 1)
        box.append((start, start + (max(0, stop - start - 1) // step) * step + 1 if stop > start else start))
    return tuple(box)


def strides_of(index: Index) -> tuple[int | slice, ...]:
    """What remains to be done to the box of an index once it is read: steps, and dimensions that one number takes."""
    return tuple(slice(None, None, at.step) if isinstance(at, slice) else 0 for at in index)


def within(shape: Sequence[int], index: Index, box: Box) -> Index:
    """The index of `tensor[index][box]`, for a box of what `index` keeps."""
    rest, found = list(box), []
    for dim, size in enumerate(shape):
        at = index[dim] if dim < len(index) else slice(None)
        if not isinstance(at, slice):
            found.append(at)
            continue
        first, _, step = at.indices(size)
        start, stop = rest.pop(0)
        found.append(slice(first + start * step, first + (stop - 1) * step + 1, step if step > 1 else None))
    return tuple(found)


def overlap(shape: Sequence[int], box: Box, piece: Piece, file_shape: Sequence[int]) -> Overlap | None:
    """What `piece` of our tensor gives to a box of it; None where they do not meet.

    The file's part is to be transposed where the piece says so; single numbers of ours stay as dimensions of size 1.
    """
    own = box_of(shape, piece.index)
    met = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, own, strict=True))
    if any(start >= stop for start, stop in met):
        return None
    ours = tuple(slice(start - begin, stop - begin) for (start, stop), (begin, _) in zip(met, box, strict=True))
    kept = [
        (start - begin, stop - begin)
        for dim, ((start, stop), (begin, _)) in enumerate(zip(met, own, strict=True))
        if dim >= len(piece.index) or isinstance(piece.index[dim], slice)
    ]
    if piece.transposed:
        kept[-2:] = kept[-1], kept[-2]
    return Overlap(ours, within(file_shape, piece.file_index, tuple(kept)))


class Region(NamedTuple):
    """The part of a box of a file's tensor that a piece makes up, counted from the box's begin, and whence it comes."""

    out: Index
    ours: Box


def region(shape: Sequence[int], piece: Piece, file_shape: Sequence[int], box: Box) -> Region | None:
    """The inverse of `overlap`: what of our tensor goes to a box of the file's; None where the piece is not in it.

    `out` is to be transposed where the piece says so; single numbers of ours stay as dimensions of size 1.
    """
    out: list[int | slice] = []
    kept: list[tuple[int, int]] = []
    for dim, (begin, end) in enumerate(box):
        at = piece.file_index[dim] if dim < len(piece.file_index) else slice(None)
        if not isinstance(at, slice):
            if not begin <= at < end:
                return None
            out.append(at - begin)
            continue
        start, stop, step = at.indices(file_shape[dim])
        first = max(0, -((start - begin) // step))
        last = min(-((start - stop) // step), -((start - end) // step))
        if first >= last:
            return None
        out.append(slice(start + first * step - begin, start + (last - 1) * step - begin + 1, step))
        kept.append((first, last))
    if piece.transposed:
        kept[-2:] = kept[-1], kept[-2]
    ours: list[tuple[int, int]] = []
    for dim in range(len(shape)):
        at = piece.index[dim] if dim < len(piece.index) else slice(None)
        if isinstance(at, slice):
            first, last = kept.pop(0)
            start = at.start or 0
            ours.append((start + first, start + last))
        else:
            ours.append((at, at + 1))
    return Region(tuple(out), tuple(ours))
