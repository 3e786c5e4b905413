"""Files of text as streams of documents: plain text, JSON lines, both compressed or not, and Parquet.

Lines and records are read one at a time, so a file may be larger than memory. A plain text file is one document.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from moesaic.errors import DataError, MissingDependencyError

FIELD = "text"  # of a JSON line, and the column of a Parquet file
FORMATS = ".txt, .jsonl (both also .gz or .zst) or .parquet"

_CHUNK_BYTES = 1 << 20
_ROWS = 256  # of a Parquet file at a time
_OBJECT_EXAMPLE = 'each line must be an object like {"text": "..."}'


def is_text_file(path: Path) -> bool:
    """Whether `read_documents` knows this kind of file; hidden ones are left alone."""
    return _kind(path) in _READERS and not path.name.startswith(".") and path.is_file()


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file, in its order.

    Raises DataError with the line or row for what is no text, or is cut short; MissingDependencyError for Parquet
    without pyarrow.
    """
    try:
        yield from _READERS[_kind(path)](path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; make it readable or remove it") from error


def read_rows(path: Path, example: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a .jsonl file, compressed or not.

    Raises DataError with the line for what is no JSON object, and says that it should be like `example`.
    """
    try:
        for number, line in _json_lines(path):
            row = _parsed(path, number, line, example)
            if not isinstance(row, dict):
                raise DataError(f"{path} line {number} is a {type(row).__name__}; {example}")
            yield number, row
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; make it readable or remove it") from error


def is_rows_file(path: Path) -> bool:
    """Whether `read_rows` knows this kind of file; hidden ones are left alone."""
    return _kind(path) == ".jsonl" and not path.name.startswith(".") and path.is_file()


def _kind(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in _DECOMPRESSORS else path).suffix


def _text_document(path: Path) -> Iterator[str]:
    data = b"".join(_chunks(path))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(f"{path}", error)) from error
    yield text.removeprefix("\ufeff").replace("\r\n", "\n")


def _json_documents(path: Path) -> Iterator[str]:
    return (_json_text(path, number, line) for number, line in _json_lines(path))


def _json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(_lines(_chunks(path)), start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line


def _parsed(path: Path, number: int, line: bytes, example: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(f"{path} line {number}", error)) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {number} is not JSON ({error.msg} at column {error.colno}); {example}") from error
    except RecursionError as error:
        raise DataError(f"{path} line {number} is nested too deeply; {example}") from error


def _json_text(path: Path, number: int, line: bytes) -> str:
    row = _parsed(path, number, line, _OBJECT_EXAMPLE)
    if not isinstance(row, dict) or not isinstance(row.get(FIELD), str):
        seen = f"fields {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f'{path} line {number} has no string "{FIELD}" ({seen}); {_OBJECT_EXAMPLE}')
    if b"\\u" in line:  # the only way to half a character: UTF-8 itself has none
        check_characters(path, number, FIELD, row[FIELD])
    return row[FIELD]


def check_characters(path: Path, number: int, name: str, text: str) -> None:
    """Raises DataError for a text with half a character, which JSON can write as an escape and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path} line {number} has half a character (\\u{ord(text[error.start]):04x}) at place {error.start} of "
            f'its "{name}"; escape characters above U+FFFF as a pair, or write them as UTF-8'
        ) from error


def _parquet_documents(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} is a Parquet file, which needs pyarrow; run: pip install 'moesaic[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            yield from _column(path, file)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's own; pyarrow's say what is wrong with the file
            raise
        said = " ".join(str(error).split())[:160]
        raise DataError(f"{path} is not a whole Parquet file ({said}); copy or write it again") from error


def _column(path: Path, file: Any) -> Iterator[str]:
    names = file.schema_arrow.names
    if FIELD not in names:
        raise DataError(f'{path} has no column "{FIELD}" (columns {", ".join(names)}); rename the one with text')
    row = 0
    for batch in file.iter_batches(batch_size=_ROWS, columns=[FIELD]):
        for text in batch.column(0).to_pylist():
            row += 1
            if not isinstance(text, str):
                seen = "null" if text is None else f"a {type(text).__name__}"
                raise DataError(f'{path} row {row} has no string "{FIELD}" but {seen}; drop or fix that row')
            yield text


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    return (
        f"{where} is not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x}); convert it, for example with "
        "iconv -f LATIN1 -t UTF-8"
    )


def _chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed if its name says so."""
    return _DECOMPRESSORS.get(path.suffix, _raw)(path)


def _raw(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from iter(lambda: file.read(_CHUNK_BYTES), b"")


def _gunzip(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as file:
            yield from iter(lambda: file.read(_CHUNK_BYTES), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(_not_whole(path, "gzip", error)) from error


def _unzstd(path: Path) -> Iterator[bytes]:
    """By frames: the library's own stream reader takes a file that was cut short for one that ends there."""
    frame = None
    try:
        for piece in _raw(path):
            while piece:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(piece)
                piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise DataError(_not_whole(path, "zstd", error)) from error
    if frame is not None:
        raise DataError(_not_whole(path, "zstd", "it ends within a frame"))


def _not_whole(path: Path, kind: str, reason: object) -> str:
    return f"{path} is not a whole {kind} file ({reason}); copy it again"


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []  # of a line that is longer than what has been read
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    yield b"".join(begun)


_DECOMPRESSORS: dict[str, Callable[[Path], Iterator[bytes]]] = {".gz": _gunzip, ".zst": _unzstd}
_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _text_document,
    ".jsonl": _json_documents,
    ".parquet": _parquet_documents,
}
