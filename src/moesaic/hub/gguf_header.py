"""The header of a GGUF file, read without its tensors' bytes, which need not be there, and without the gguf package.

Format: "GGUF", a version, how many tensors and keys there are, the keys with their values, then each tensor's name,
shape (innermost first), type and offset; little-endian (github.com/ggml-org/ggml, docs/gguf.md).
"""

import math
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moesaic.errors import CheckpointError

BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1),
    25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Of each type its name, how many numbers make a block, and a block's bytes."""

_SCALARS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")
_TEXT, _ARRAY = 8, 9
_MOST = 2**24  # of keys, tensors and dimensions no file has as many: damage that would be read on for hours


class GgufTensor(NamedTuple):
    """One tensor: its shape as torch counts it, outermost first, its type, and what it takes in the file."""

    shape: tuple[int, ...]
    type: str
    num_bytes: int


class GgufHeader(NamedTuple):
    """Keys with plain values, arrays of texts by their lengths alone, and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Keys and tensors of a file. Raises CheckpointError where the header is damaged or cut short."""
    try:
        with path.open("rb") as file:
            return _read(_Reader(file, path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise _damaged(path, "a name in it is no text") from error


def read_gguf_headers(path: Path) -> GgufHeader:
    """The same of a file, and where it is one of several that a model was split into, with the tensors of all.

    Raises CheckpointError for a part that is not there.
    """
    header = read_gguf_header(path)
    count = header.metadata.get("split.count", 1)
    parts = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if not isinstance(count, int) or count < 2 or parts is None:
        return header
    paths = [path.with_name(f"{parts[1]}-{number:05d}-of-{parts[2]}.gguf") for number in range(1, count + 1)]
    if absent := [each.name for each in paths if not each.is_file()]:
        raise CheckpointError(f"{path} is one of {count} parts, and {absent[0]} is not beside it; copy all of them")
    headers = [read_gguf_header(each) for each in paths]
    tensors = {name: tensor for each in headers for name, tensor in each.tensors.items()}
    return GgufHeader(headers[0].metadata, tensors)


def _read(reader: "_Reader") -> GgufHeader:
    if reader.take(4) != b"GGUF":
        raise CheckpointError(f"{reader.path} does not start like a GGUF file; copy or download it again")
    version = reader.number("I")
    if version not in (2, 3):
        raise CheckpointError(f"{reader.path} is of GGUF version {version}; known: 2, 3")
    num_tensors, num_keys = reader.count(), reader.count()
    metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(num_keys)}
    return GgufHeader(metadata, dict(reader.tensor() for _ in range(num_tensors)))


class _Reader:
    """Values one after another."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path

    def take(self, size: int) -> bytes:
        found = self.file.read(size)
        if len(found) < size:
            raise _damaged(self.path, "it ends within its header")
        return found

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def count(self) -> int:
        number = self.number("Q")
        if number > _MOST:
            raise _damaged(self.path, f"it counts {number:,} of something")
        return number

    def text(self) -> str:
        return self.take(self.count()).decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        return self.number(self._code(kind))

    def _array(self) -> Any:
        """Numbers; of texts only how many: nothing that is planned hangs on a vocabulary's words."""
        kind, length = self.number("I"), self.count()
        if kind == _TEXT:
            for _ in range(length):
                self.take(self.count())
            return length
        if kind == _ARRAY:
            return [self._array() for _ in range(length)]
        code = self._code(kind)
        return list(struct.unpack(f"<{length}{code}", self.take(length * struct.calcsize(code))))

    def _code(self, kind: int) -> str:
        code = _SCALARS[kind] if kind < len(_SCALARS) else None
        if code is None:
            raise _damaged(self.path, f"a value is of type {kind}")
        return code

    def tensor(self) -> tuple[str, GgufTensor]:
        name, dims = self.text(), self.number("I")
        if dims > 8:
            raise _damaged(self.path, f"{name} has {dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(dims))[::-1]
        kind, _ = self.number("I"), self.number("Q")
        if kind not in BLOCKS:
            raise CheckpointError(f"{self.path}: {name} is of type {kind}, which is not known; convert it to another")
        word, numbers, size = BLOCKS[kind]
        if shape and shape[-1] % numbers:
            raise _damaged(self.path, f"rows of {shape[-1]} numbers of {name} do not divide into blocks of {word}")
        return name, GgufTensor(shape, word, math.prod(shape) // numbers * size)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is cut short or damaged: {why}; copy or download it again")
