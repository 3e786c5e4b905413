"""The header of a safetensors file, read and written without torch: names, dtypes, shapes and where the bytes lie.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes, row-major, without gaps.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from moesaic.errors import CheckpointError

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


class TensorHeader(NamedTuple):
    """One tensor of a file: its dtype in the file's own spelling, its shape, the file, and its first byte there."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = 0

    @property
    def num_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Every tensor of a file. Raises CheckpointError when the file is cut short or is no safetensors file."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if len(prefix) == 8 and header_bytes > file_bytes - 8:
            raise _damaged(path, f"its header should take {header_bytes:,} bytes and the file has {file_bytes:,}")
        text = file.read(header_bytes)
    try:
        entries = json.loads(text)
        start = 8 + header_bytes
        tensors = {name: _tensor(path, start, entry) for name, entry in entries.items() if name != "__metadata__"}
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(path, "its header is not what a safetensors file starts with") from error
    needed = start + max(ends, default=0)
    if needed > file_bytes:
        raise _damaged(path, f"its tensors end at byte {needed:,} and the file has {file_bytes:,}")
    return tensors


def _tensor(path: Path, start: int, entry: dict[str, Any]) -> TensorHeader:
    begin, end = entry["data_offsets"]
    header = TensorHeader(entry["dtype"], tuple(int(size) for size in entry["shape"]), path, start + begin)
    item = ITEM_BYTES.get(header.dtype)
    if item is not None and end - begin != item * math.prod(header.shape):
        raise ValueError("offsets disagree with the shape")
    return header


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is cut short or damaged: {why}; copy or download it again")


def header_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The start of a file that holds these tensors (name -> dtype, shape) one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8
    return struct.pack("<Q", len(text)) + text
