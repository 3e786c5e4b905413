import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.data.corpus import build_corpus, cut, folder_corpus
from moesaic.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@given(st.text(alphabet="ab \n", max_size=400), st.integers(1, 40))
def test_pieces_of_a_cut_text_join_to_it_and_keep_their_size(text: str, num_chars: int) -> None:
    pieces = list(cut(text, num_chars))
    assert "".join(pieces) == text
    assert all(num_chars <= len(piece) <= 2 * num_chars for piece in pieces[:-1])


def test_a_text_is_cut_at_paragraph_ends() -> None:
    paragraphs = [f"Paragraph {i} is here.\nIt has two lines.\n\n" for i in range(50)]
    pieces = list(cut("".join(paragraphs), 60))
    assert len(pieces) > 10
    assert all(piece.endswith("\n\n") for piece in pieces)


@given(
    st.dictionaries(st.sampled_from("abc"), st.lists(st.text("xyz é", min_size=1), min_size=2, max_size=30), min_size=1)
)
def test_no_held_out_document_is_in_training_and_none_is_lost(documents: dict[str, list[str]]) -> None:
    wanted = {text for texts in documents.values() for text in texts if text.strip()}
    try:
        corpus = build_corpus("test", documents)
    except DataError:
        return  # a domain was left with fewer than two different documents
    train = [text for domain in corpus.domains for text in domain.train]
    held_out = [text for domain in corpus.domains for text in domain.held_out]
    assert all(len(domain.train) and len(domain.held_out) for domain in corpus.domains)
    assert sorted(train + held_out) == sorted(wanted)
    assert corpus.num_bytes == sum(len(text.encode()) for text in wanted)
    assert all(len(domain.train) == len(list(domain.train)) for domain in corpus.domains)
    assert corpus.num_bytes == sum(len(text.encode()) for text in train + held_out)


def test_about_five_percent_is_held_out_of_a_large_domain() -> None:
    documents = [f"{i} " * 500 for i in range(2000, 4000)]
    (domain,) = build_corpus("test", {"numbers": documents}).domains
    total = domain.train.num_bytes + domain.held_out.num_bytes
    assert 0.045 * total < domain.held_out.num_bytes < 0.065 * total
    assert domain.held_out.num_bytes >= 100_000


def test_the_split_does_not_depend_on_the_order_of_domains() -> None:
    documents = {"a": [f"a{i}" for i in range(40)], "b": [f"b{i}" for i in range(40)]}
    first = build_corpus("test", documents)
    second = build_corpus("test", dict(reversed(documents.items())))
    assert [list(domain.held_out) for domain in first.domains] == [list(domain.held_out) for domain in second.domains]
    assert first.digest == second.digest
    assert first.digest != build_corpus("test", {**documents, "a": ["other", "texts"]}).digest


def test_a_folder_of_both_kinds_of_files(tmp_path: Path) -> None:
    write(tmp_path / "prose" / "book.txt", "\ufeff" + "A paragraph of some length.\r\n\r\n" * 300)
    rows = [json.dumps({"text": f"document {i} é"}, ensure_ascii=False) for i in range(30)]
    write(tmp_path / "code" / "deep" / "files.jsonl", "\n".join(rows) + "\n\n")
    write(tmp_path / "code" / "notes.md", "not read")
    write(tmp_path / ".hidden" / "x.txt", "not read")
    corpus = folder_corpus(tmp_path)
    assert corpus.names == ("code", "prose")
    code, prose = corpus.domains
    assert sorted([*code.train, *code.held_out]) == sorted(f"document {i} é" for i in range(30))
    assert len(code.held_out) >= 1
    assert len(prose.train) >= 1 and not set("\r\ufeff") & set("".join(prose.train))


def test_a_single_short_file_still_gives_something_to_hold_out(tmp_path: Path) -> None:
    write(tmp_path / "prose" / "book.txt", "".join(f"Sentence number {i} of this text.\n\n" for i in range(100)))
    (domain,) = folder_corpus(tmp_path).domains
    assert 0 < domain.held_out.num_bytes < domain.train.num_bytes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has no subfolders; make one for each domain, for example .*/prose/book\.txt"),
        ({"book.txt": "text"}, r"book\.txt lies directly in .*move it into a subfolder"),
        ({"a/readme.md": "text"}, r"domain 'a' has no text; put \.txt, \.jsonl .*or \.parquet files into"),
        ({"a/x.txt": "  \n"}, r"domain 'a' has no text"),
        ({"a/x.txt": "short"}, r"domain 'a' has 1 different documents; it needs at least 2"),
        ({"a/x.txt": b"caf\xe9 noir"}, r"x\.txt is not UTF-8 at byte 3 \(0xe9\); convert it"),
        ({"a/x.jsonl": '{"text": "one"}\n{"text": '}, r"x\.jsonl line 2 is not JSON .*each line must be"),
        ({"a/x.jsonl": '{"body": "one"}'}, r'x\.jsonl line 1 has no string "text" \(fields body\)'),
        ({"a/x.jsonl": '["one"]'}, r'x\.jsonl line 1 has no string "text" \(a list\)'),
    ],
)
def test_bad_folders_are_one_line_that_says_what_to_do(
    tmp_path: Path, files: dict[str, str | bytes], message: str
) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        folder_corpus(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_a_file_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*; give one with a subfolder for each domain"):
        folder_corpus(tmp_path / "absent")
    with pytest.raises(DataError, match="is a file; give a folder"):
        folder_corpus(write(tmp_path / "book.txt", "text"))


def test_a_document_that_comes_again_is_kept_once_and_in_its_first_place() -> None:
    documents = {"a": [f"a{i}" for i in range(30)] + ["a3"], "b": ["a7", *(f"b{i}" for i in range(30)), " "]}
    corpus = build_corpus("test", documents)
    assert {d.name: sorted([*d.train, *d.held_out]) for d in corpus.domains} == {
        "a": sorted(f"a{i}" for i in range(30)),
        "b": sorted(f"b{i}" for i in range(30)),
    }


def test_the_split_is_the_same_however_the_text_lies_in_files(tmp_path: Path) -> None:
    texts = [f"document {i}, " * (i % 7 + 1) for i in range(200)]
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    write(tmp_path / "one" / "d" / "all.jsonl", "".join(rows))
    for i in range(4):
        write(tmp_path / "four" / "d" / f"{i}.jsonl.gz", gzip.compress("".join(rows[50 * i : 50 * i + 50]).encode()))
    for i, text in enumerate(texts):
        write(tmp_path / "many" / "d" / f"{i:03}.txt", text)
    digests = {folder_corpus(tmp_path / name).digest for name in ("one", "four", "many")}
    assert digests == {build_corpus("test", {"d": texts}).digest}


def test_text_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "d" / "x.jsonl", "".join(f'{{"text": "document {i}"}}\n' for i in range(40)))
    (domain,) = folder_corpus(tmp_path).domains
    whole = path.read_bytes()
    for changed in (
        whole.replace(b"t 7", b"t x"),
        whole + b'{"text": "more"}',
        whole[: whole.index(b'{"text": "document 30')],
    ):
        path.write_bytes(changed)
        with pytest.raises(DataError, match="the text of domain 'd' changed while it was read"):
            list(domain.split_documents())


def test_reading_tells_how_far_it_is() -> None:
    told = []
    build_corpus("test", {"a": [f"a{i:04}" for i in range(2500)], "b": ["bb", "ccc"]}, listen=told.append)
    assert [reading.documents for reading in told] == [1000, 2000, 2500, 2502]
    assert told[-1].num_bytes == 2500 * 5 + 5
