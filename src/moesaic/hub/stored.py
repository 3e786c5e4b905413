"""Tensors as they lie in safetensors files: any part of any of them, read straight to where it belongs."""

import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.hub.parts import Box, box_of, box_shape, strides_of
from moesaic.hub.safetensors_header import TensorHeader
from moesaic.models.weight_map import Index

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What a weight may be, in the spelling of safetensors."""

STORED = DTYPES | {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
SPELLINGS = {dtype: name for name, dtype in STORED.items()}


class Tensors(Protocol):
    """Tensors by name, read part by part; a view of quantized ones offers the same."""

    @property
    def tensors(self) -> Mapping[str, TensorHeader]: ...
    def read(self, name: str, index: Index = ()) -> Tensor: ...
    def read_into(self, out: Tensor, name: str, index: Index = ()) -> None: ...


class StoredTensors:
    """The tensors of some safetensors files, bit for bit.

    Plain reads rather than a memory map: what is read lands in its tensor at once, mapped pages would count as memory
    of this process, and a file that shrinks meanwhile is an error and no signal.
    """

    def __init__(self, tensors: Mapping[str, TensorHeader]) -> None:
        self.tensors = tensors

    def read(self, name: str, index: Index = ()) -> Tensor:
        """`tensor[index]`, freshly allocated. Raises CheckpointError when the file cannot be read."""
        header = self.tensors[name]
        box = box_of(header.shape, index)
        values = torch.empty(box_shape(box), dtype=STORED[header.dtype])
        _fill(values, name, header, box)
        return values[strides_of(index)]

    def read_into(self, out: Tensor, name: str, index: Index = ()) -> None:
        """`out.copy_(tensor[index])`, without a copy between where the bytes can go straight to their place."""
        header = self.tensors[name]
        has_steps = any(isinstance(at, slice) and at.step not in (None, 1) for at in index)
        is_same = out.dtype == STORED[header.dtype] and out.device.type == "cpu"
        if is_same and out.is_contiguous() and not has_steps:
            _fill(out, name, header, box_of(header.shape, index))
        else:
            out.copy_(self.read(name, index))


def _fill(out: Tensor, name: str, header: TensorHeader, box: Box) -> None:
    """Read a box of a tensor into a contiguous one of as many elements."""
    target = out.detach().reshape(-1).view(torch.uint8).numpy().data
    done = 0
    try:
        # Opened anew for every part, which takes microseconds: threads share no position, and nothing stays open.
        with header.file.open("rb", buffering=0) as file:
            for offset, num_bytes in _runs(header, box, out.element_size()):
                file.seek(offset)
                end = done + num_bytes
                while done < end:
                    count = file.readinto(target[done:end])
                    if not count:
                        raise CheckpointError(f"{header.file} ends within {name}; copy or download it again")
                    done += count
    except OSError as error:
        raise CheckpointError(
            f"cannot read {name} from {header.file} ({error.strerror}); copy or download it again"
        ) from error


def _runs(header: TensorHeader, box: Box, item_bytes: int) -> Iterator[tuple[int, int]]:
    """Where the bytes of a box lie: (offset in the file, length) of every contiguous run, in order."""
    sizes = header.shape
    partial = [dim for dim, size in enumerate(sizes) if box[dim] != (0, size)]
    last = partial[-1] if partial else 0
    inner = [math.prod(sizes[dim + 1 :]) * item_bytes for dim in range(len(sizes))]
    if not sizes:
        yield header.offset, item_bytes
        return
    length = (box[last][1] - box[last][0]) * inner[last]
    for at in product(*(range(*each) for each in box[:last])):
        start = sum(position * width for position, width in zip(at, inner, strict=False))
        yield header.offset + start + box[last][0] * inner[last], length


def known_dtype(name: str, header: TensorHeader, known: Mapping[str, torch.dtype]) -> torch.dtype:
    """The torch dtype of a stored one. Raises CheckpointError that lists what is `known`."""
    if header.dtype not in known:
        raise CheckpointError(
            f"{name} in {header.file} is of type {header.dtype}; known: {', '.join(known)}. "
            "Use an unquantized checkpoint"
        )
    return known[header.dtype]
