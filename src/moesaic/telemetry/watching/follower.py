"""New lines of a file that another process writes, perhaps on another machine."""

from pathlib import Path
from typing import BinaryIO, NamedTuple

_TAIL_BYTES = 256  # remembered of what was read, to see whether it still stands there
_CHUNK_BYTES = 1 << 24


class NewLines(NamedTuple):
    """Whole lines that were added since the last look. is_anew: the file was cut or replaced; these are all of it."""

    lines: list[bytes]
    is_anew: bool


class Follower:
    """Reads what is added to a file. A line counts once it ends; what a restart cut off is noticed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset, self._tail = 0, b""

    def read(self) -> NewLines:
        """The lines since the last call; none where there is no file yet. Raises OSError when it cannot be read."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            is_anew = self._offset > 0
            self._offset, self._tail = 0, b""
            return NewLines([], is_anew)
        with file:
            is_anew = not self._still_stands(file)
            if is_anew:
                self._offset, self._tail = 0, b""
            file.seek(self._offset)
            lines: list[bytes] = []
            rest = b""
            while chunk := file.read(_CHUNK_BYTES):
                *whole, rest = (rest + chunk).split(b"\n")
                lines += whole
        read = sum(map(len, lines)) + len(lines)
        if read:
            self._offset += read
            self._tail = (self._tail + b"\n".join(lines[-8:]) + b"\n")[-_TAIL_BYTES:]
        return NewLines(lines, is_anew)

    def _still_stands(self, file: BinaryIO) -> bool:
        file.seek(max(0, self._offset - len(self._tail)))
        return file.read(len(self._tail)) == self._tail
