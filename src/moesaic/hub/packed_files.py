"""Packed weights as a file, so that a model is packed once: mapped into memory they are ready to multiply.

A safetensors file: each packed matrix is a U8 tensor [E, bytes of one], in the layout of csrc/packed.h, which is the
same for every instruction set; `__metadata__` has our entry, JSON of versions, source and shapes. The header is padded
so that every tensor lies on a multiple of 64 bytes.
"""

import hashlib
import json
import math
import mmap
import os
import struct
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from moesaic.errors import CheckpointError, ConfigError
from moesaic.hub.safetensors_header import TensorHeader, read_header
from moesaic.kernels.blocks import PackedMatrices, PackedShape

FILE_VERSION = 1
LAYOUT_VERSION = 2
"""Raised by every change of the bytes that blocks.py or rounding.py make of a weight."""

_ENTRY = "moesaic_packed"
_ALIGNMENT = 64
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_MAP_NORESERVE = 0x4000  # of Linux; Python 3.13 names it


class Source(NamedTuple):
    """What weights were packed from: a name for people, and a checksum that tells another state of it."""

    name: str
    checksum: str


def source_of(name: str, files: Sequence[Path]) -> Source:
    """The source that these files are, by their names, sizes, first bytes and samples of the rest.

    Raises CheckpointError for files that cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{path.name}\0{size}\0".encode())
                for place in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_BYTES) * place // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise CheckpointError(f"cannot read {path} ({error.strerror}); copy or download it again") from error
    return Source(name, digest.hexdigest())


def write_packed(path: Path, matrices: Mapping[str, PackedMatrices], source: Source) -> None:
    """Write a file of packed matrices, beside `path` first: what is there stays as it is until the new one is whole.

    Raises CheckpointError when it cannot be written.
    """
    new = path.with_name(f".{path.name}.new-{uuid.uuid4().hex[:8]}")
    try:
        with new.open("wb") as file:
            file.write(_header(matrices, source))
            for packed in matrices.values():
                file.write(packed.data.contiguous().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot write {path}: {reason}; free space or choose another place") from error
    finally:
        new.unlink(missing_ok=True)


def read_packed(path: Path, source: Source, remedy: str) -> dict[str, PackedMatrices]:
    """The matrices of a file, mapped into memory: nothing is read before it is used.

    remedy: what makes the file anew ("run `...`"), the end of every message. Pages are private: writing to the tensors
    changes no file. Raises CheckpointError for a file that cannot be read, is cut short, or is of another version or
    another source. Bytes of the weights themselves are not checked.
    """
    try:
        with path.open("rb") as file:
            contents = _contents(path, file, remedy)
            if contents.source != source:
                raise CheckpointError(_difference(path, contents.source, source, remedy))
            return _mapped(path, file, contents.shapes, remedy)
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}); {remedy}") from error


class _Contents(NamedTuple):
    source: Source
    shapes: dict[str, PackedShape]


def _header(matrices: Mapping[str, PackedMatrices], source: Source) -> bytes:
    contents = {
        "file_version": FILE_VERSION,
        "layout_version": LAYOUT_VERSION,
        "source": source._asdict(),
        "shapes": {name: asdict(packed.shape) for name, packed in matrices.items()},
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _ENTRY: json.dumps(contents)}}
    offset = 0
    for name, packed in matrices.items():
        end = offset + packed.data.nbytes
        header[name] = {"dtype": "U8", "shape": list(packed.data.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _contents(path: Path, file: BinaryIO, remedy: str) -> _Contents:
    (size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
    file.seek(0, os.SEEK_END)
    damaged = CheckpointError(f"{path} is cut short or damaged; {remedy}")
    if not 0 < size <= file.tell() - 8:
        raise damaged
    file.seek(8)
    try:
        entry = json.loads(file.read(size))["__metadata__"][_ENTRY]
        told = json.loads(entry)
        versions = (told["file_version"], told["layout_version"])
        if versions != (FILE_VERSION, LAYOUT_VERSION):
            ours = f"{FILE_VERSION}.{LAYOUT_VERSION}"
            raise CheckpointError(f"{path} is of version {versions[0]}.{versions[1]} and this is {ours}; {remedy}")
        shapes = {name: _shape(**shape) for name, shape in told["shapes"].items()}
        return _Contents(Source(**told["source"]), shapes)
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise damaged from error


def _shape(**fields: Any) -> PackedShape:
    sizes = [fields[name] for name in ("outputs", "inputs", "group")]
    if not all(type(size) is int and size >= 0 for size in sizes) or type(fields["paired"]) is not bool:
        raise ValueError("sizes that no matrix has")
    return PackedShape(**fields)


def _difference(path: Path, found: Source, wanted: Source, remedy: str) -> str:
    if found.name != wanted.name:
        return f"{path} was packed from {found.name} and not from {wanted.name}; {remedy}"
    return f"{path} was packed from another state of {wanted.name}; {remedy}"


def _mapped(path: Path, file: BinaryIO, shapes: dict[str, PackedShape], remedy: str) -> dict[str, PackedMatrices]:
    damaged = CheckpointError(f"{path} is cut short or damaged; {remedy}")
    try:
        headers = read_header(path)
    except (CheckpointError, RecursionError) as error:
        raise damaged from error
    if headers.keys() != shapes.keys() or not all(_fits(headers[name], shapes[name]) for name in shapes):
        raise damaged
    if not shapes:
        return {}
    every = torch.frombuffer(_pages(file), dtype=torch.uint8)
    return {name: PackedMatrices(_view(every, headers[name]), shape) for name, shape in shapes.items()}


def _fits(header: TensorHeader, shape: PackedShape) -> bool:
    is_bytes = header.dtype == "U8" and len(header.shape) == 2
    return is_bytes and header.shape[1] == shape.num_bytes and header.offset % _ALIGNMENT == 0


def _view(every: Tensor, header: TensorHeader) -> Tensor:
    return every[header.offset : header.offset + math.prod(header.shape)].view(header.shape)


def _pages(file: BinaryIO) -> mmap.mmap:
    """The whole file. Private pages that may be written, since torch takes no others without a warning; none of them is
    set aside before it is, so that files may be larger than memory."""
    if sys.platform != "linux":
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    allowed = mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=allowed)
