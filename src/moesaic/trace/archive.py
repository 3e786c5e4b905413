"""A zip of .npy arrays that ends in its own SHA-256: written piece by piece, read as views of one mapped file."""

import hashlib
import io
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from moesaic.trace.layout import DIGEST_BYTES

_ALIGNMENT = 64  # of every .npy in the file; numpy aligns what follows its header
_PADDING_ID = 0x4C41  # an extra field that no zip program knows, which they skip
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # PKWARE APPNOTE 4.3.7
_EXTRA_HEADER_BYTES, _ZIP64_BYTES = 4, 20  # 4.5.1 and 4.5.3
_HASH_BYTES = 1 << 20


class ArrayParts(NamedTuple):
    """An array on its way to the file, as the bytes of its pieces."""

    name: str
    dtype: np.dtype
    length: int
    pieces: Iterable[bytes]


def write_archive(file: BinaryIO, arrays: Iterable[ArrayParts]) -> None:
    """Write the arrays, with room for the digest at the end. The same arrays give the same bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = b"0" * DIGEST_BYTES
        for array in arrays:
            entry = zipfile.ZipInfo(f"{array.name}.npy")  # dated 1980: no clock in the bytes
            entry.extra = _padding(file.tell() + _LOCAL_HEADER.size + len(entry.filename) + _ZIP64_BYTES)
            with archive.open(entry, "w", force_zip64=True) as member:
                header = {"descr": npy.dtype_to_descr(array.dtype), "fortran_order": False, "shape": (array.length,)}
                npy.write_array_header_1_0(member, header)
                for piece in array.pieces:
                    member.write(piece)


def seal(file: BinaryIO) -> None:
    """Write the digest of all that stands before its place."""
    end = file.seek(0, io.SEEK_END) - DIGEST_BYTES
    file.seek(0)
    digest = hashlib.sha256()
    while rest := end - file.tell():
        digest.update(file.read(min(rest, _HASH_BYTES)))
    file.write(digest.hexdigest().encode())


def is_whole(data: np.ndarray) -> bool:
    """Whether a file's bytes end in the SHA-256 of those before."""
    if len(data) <= DIGEST_BYTES:
        return False
    return hashlib.sha256(data[:-DIGEST_BYTES].data).hexdigest().encode() == data[-DIGEST_BYTES:].tobytes()


def read_archive(path: Path, data: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays, as views of the file's bytes. Raises ValueError or BadZipFile for what was not written here."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            yield entry.filename.removesuffix(".npy"), _view(data, entry)


def _padding(position: int) -> bytes:
    """An extra field after which, at `position` and its own length, a multiple of the alignment is reached."""
    length = -(position + _EXTRA_HEADER_BYTES) % _ALIGNMENT
    return struct.pack("<HH", _PADDING_ID, length) + bytes(length)


def _view(data: np.ndarray, entry: zipfile.ZipInfo) -> np.ndarray:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed")
    *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(data.data, entry.header_offset)
    begin = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    member = data[begin : begin + entry.file_size]
    stream = io.BytesIO(member[:1024].tobytes())  # our headers are 128 bytes
    if npy.read_magic(stream) != (1, 0):
        raise ValueError(f"{entry.filename} is no .npy of version 1.0")
    shape, fortran_order, dtype = npy.read_array_header_1_0(stream)
    if fortran_order or len(shape) != 1 or dtype.hasobject:
        raise ValueError(f"{entry.filename} has shape {shape} and dtype {dtype}")
    array = member[stream.tell() :].view(dtype)
    if array.shape != shape:
        raise ValueError(f"{entry.filename} should have {shape[0]} elements and has {len(array)}")
    return array
