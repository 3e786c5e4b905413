"""Writing to a file without a buffer: nothing is left over for its closing to try again."""

from typing import BinaryIO, Protocol


class _Raw(Protocol):
    def write(self, data: memoryview, /) -> int | None: ...


def write_whole(file: "BinaryIO | _Raw", data: bytes) -> None:
    """Write all of it: an unbuffered file may take only a part at a time. Raises OSError when the disk says no."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) or 0 :]
