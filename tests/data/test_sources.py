import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data import sources
from moesaic.data.sources import is_text_file, read_documents
from moesaic.errors import DataError, MissingDependencyError


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}
TEXTS = ["one", "two\nlines é", "", "  spaces ", "\U0001f600 \x85 \u2028 not a line end", "\\ud800 is only text"]


def jsonl(texts: list[str], ensure_ascii: bool = False) -> bytes:
    return "".join(json.dumps({"text": text, "id": 1}, ensure_ascii=ensure_ascii) + "\n" for text in texts).encode()


@pytest.mark.parametrize("compression", PACKERS)
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_json_lines_come_back_as_they_were(tmp_path: Path, compression: str, ensure_ascii: bool) -> None:
    path = tmp_path / f"part.0.jsonl{compression}"
    path.write_bytes(PACKERS[compression](b"\xef\xbb\xbf" + jsonl(TEXTS, ensure_ascii) + b"\r\n \n"))
    assert is_text_file(path)
    assert list(read_documents(path)) == TEXTS


@pytest.mark.parametrize("compression", PACKERS)
def test_a_text_file_is_one_document(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"book.txt{compression}"
    path.write_bytes(PACKERS[compression]("\ufeffone é\r\ntwo\n".encode()))
    assert list(read_documents(path)) == ["one é\ntwo\n"]


@settings(max_examples=60)
@given(
    texts=st.lists(st.text(max_size=30), max_size=12),
    chunk_bytes=st.integers(1, 40),
    compression=st.sampled_from(list(PACKERS)),
    cuts=st.integers(1, 3),
)
def test_lines_do_not_depend_on_how_a_file_is_read_or_compressed(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk_bytes: int, compression: str, cuts: int
) -> None:
    """Several frames or members one after another are one file, as parallel compressors write them."""
    path = tmp_path_factory.mktemp("jsonl") / f"x.jsonl{compression}"
    data = jsonl(texts)
    size = len(data) // cuts + 1
    path.write_bytes(b"".join(PACKERS[compression](data[i : i + size]) for i in range(0, len(data), size)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_CHUNK_BYTES", chunk_bytes)
        assert list(read_documents(path)) == texts


def test_lines_are_read_before_the_file_ends(tmp_path: Path) -> None:
    """The first documents of a file that is broken further on are there: nothing waits for the whole."""
    path = tmp_path / "x.jsonl.zst"
    whole = zstandard.ZstdCompressor(level=1).compress(jsonl([f"{i} {i**7}" for i in range(300_000)]))
    path.write_bytes(whole[: len(whole) - 10])
    documents = read_documents(path)
    assert [next(documents) for _ in range(3)] == ["0 0", "1 1", "2 128"]
    with pytest.raises(DataError, match=r"x\.jsonl\.zst is not a whole zstd file \(it ends within a frame\); copy it"):
        list(documents)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"caf\xe9 noir", r"a\.txt is not UTF-8 at byte 3 \(0xe9\); convert it"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl line 2 is not UTF-8 at byte 10 \(0xff\)"),
        ("a.jsonl", b'{"text": "one"}\n{"text": ', r"a\.jsonl line 2 is not JSON .*each line must be an object"),
        ("a.jsonl", b'{"body": "one"}', r'a\.jsonl line 1 has no string "text" \(fields body\)'),
        ("a.jsonl", b'{"text": 3}', r'a\.jsonl line 1 has no string "text" \(fields text\)'),
        ("a.jsonl", b'\n["one"]', r'a\.jsonl line 2 has no string "text" \(a list\)'),
        ("a.jsonl", b'{"text": "x\\ud83d y"}', r"a\.jsonl line 1 has half a character \(\\ud83d\) at place 1"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl line 1 is (not JSON|nested too deeply)"),
        ("a.jsonl.gz", gzip.compress(jsonl(TEXTS))[:-9], r"a\.jsonl\.gz is not a whole gzip file"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz is not a whole gzip file \(Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:15] + b"\0" * 9, r"a\.txt\.gz is not a whole gzip file"),
        ("a.jsonl.zst", zstd(jsonl(TEXTS))[:-3], r"a\.jsonl\.zst is not a whole zstd file \(it ends within a frame\)"),
        ("a.jsonl.zst", b"plain text, not zstd", r"a\.jsonl\.zst is not a whole zstd file \(zstd decompress"),
    ],
)
def test_broken_files_are_one_line_that_says_where(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_only_known_files_that_are_not_hidden_are_text(tmp_path: Path) -> None:
    for name in ("a.md", ".hidden.txt", "a.json", "a.csv.gz", "a.gz", "a.zst"):
        (tmp_path / name).write_text("x")
        assert not is_text_file(tmp_path / name)
    (tmp_path / "folder.txt").mkdir()
    assert not is_text_file(tmp_path / "folder.txt")


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*absent\.txt: No such file"):
        list(read_documents(tmp_path / "absent.txt"))


@pytest.fixture
def parquet():
    return pytest.importorskip("pyarrow.parquet")


def write_parquet(path: Path, rows: list, column: str = "text") -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({column: rows, "other": list(range(len(rows)))}), path, row_group_size=300)
    return path


def test_parquet_comes_back_as_it_was(tmp_path: Path, parquet) -> None:
    rows = [f"row {i} é" for i in range(1000)]
    path = write_parquet(tmp_path / "x.parquet", rows)
    assert is_text_file(path)
    assert list(read_documents(path)) == rows


def test_broken_parquet_is_one_line_that_says_where(tmp_path: Path, parquet) -> None:
    cases = {
        r'x\.parquet has no column "text" \(columns body, other\); rename': write_parquet(
            tmp_path / "x.parquet", ["a"], "body"
        ),
        r'y\.parquet row 301 has no string "text" but null': write_parquet(
            tmp_path / "y.parquet", ["a"] * 300 + [None] + ["b"]
        ),
        r'z\.parquet row 1 has no string "text" but a int': write_parquet(tmp_path / "z.parquet", [1, 2]),
    }
    (tmp_path / "w.parquet").write_bytes(b"no parquet at all")
    cases[r"w\.parquet is not a whole Parquet file .*; copy or write it again"] = tmp_path / "w.parquet"
    whole = write_parquet(tmp_path / "v.parquet", ["text"] * 500).read_bytes()
    (tmp_path / "v.parquet").write_bytes(whole[: len(whole) // 2])
    cases[r"v\.parquet is not a whole Parquet file"] = tmp_path / "v.parquet"
    for message, path in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            list(read_documents(path))
        assert "\n" not in str(caught.value)


def test_parquet_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingDependencyError, match=r"x\.parquet is .*pip install 'moesaic\[parquet\]'"):
        list(read_documents(tmp_path / "x.parquet"))
