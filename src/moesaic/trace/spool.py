"""Many growing arrays in one nameless file, until their lengths are known."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

BLOCK_BYTES = 1 << 16  # of one array, kept in memory before they go to the disk


class _Block(NamedTuple):
    offset: int
    num_bytes: int


class Spool:
    """Arrays that are appended to in turn and read back whole, bounded in memory by BLOCK_BYTES an array.

    The file has no name: it is gone when it is closed, however the process ends.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._num_bytes = 0
        self._blocks: dict[str, list[_Block]] = {}
        self._pending: dict[str, bytearray] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.lengths: dict[str, int] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Add values to the end of an array, which the first values make and give its dtype."""
        pending = self._pending.setdefault(name, bytearray())
        dtype = self.dtypes.setdefault(name, values.dtype)
        assert values.dtype == dtype, f"{name}: {values.dtype} after {dtype}"
        self.lengths[name] = self.lengths.get(name, 0) + len(values)
        pending += values.tobytes()
        if len(pending) >= BLOCK_BYTES:
            self._write(name, bytes(pending))
            pending.clear()

    def read(self, name: str) -> Iterator[bytes]:
        """The bytes of an array, piece by piece."""
        for block in self._blocks.get(name, ()):
            self._file.seek(block.offset)
            yield self._file.read(block.num_bytes)
        yield bytes(self._pending[name])

    def copy(self, name: str, new: str) -> None:
        """Make an array that begins as another one is."""
        self.dtypes[new], self.lengths[new], self._pending[new] = self.dtypes[name], self.lengths[name], bytearray()
        for piece in self.read(name):
            self._write(new, piece)

    def close(self) -> None:
        """Let go of everything."""
        with contextlib.suppress(OSError):  # a full disk refuses the last bytes again, and nobody wants them
            self._file.close()

    def _write(self, name: str, data: bytes) -> None:
        self._file.seek(self._num_bytes)
        self._file.write(data)
        self._blocks.setdefault(name, []).append(_Block(self._num_bytes, len(data)))
        self._num_bytes += len(data)
