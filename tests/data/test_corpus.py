import json
from pathlib import Path

import pytest
from hypothesis import given, settings
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


@settings(deadline=None)
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
    assert all(domain.train and domain.held_out for domain in corpus.domains)
    assert sorted(train + held_out) == sorted(wanted)
    assert corpus.num_bytes == sum(len(text.encode()) for text in wanted)


def test_about_five_percent_is_held_out_of_a_large_domain() -> None:
    documents = [f"{i} " * 500 for i in range(2000, 4000)]
    (domain,) = build_corpus("test", {"numbers": documents}).domains
    total = domain.train_bytes + domain.held_out_bytes
    assert 0.045 * total < domain.held_out_bytes < 0.065 * total
    assert domain.held_out_bytes >= 100_000


def test_the_split_does_not_depend_on_the_order_of_domains() -> None:
    documents = {"a": [f"a{i}" for i in range(40)], "b": [f"b{i}" for i in range(40)]}
    first = build_corpus("test", documents)
    second = build_corpus("test", dict(reversed(documents.items())))
    assert first == second
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
    assert sorted(code.train + code.held_out) == sorted(f"document {i} é" for i in range(30))
    assert len(code.held_out) >= 1
    assert len(prose.train) >= 1 and "\r" not in prose.train[0] and "\ufeff" not in "".join(prose.train)
    assert [row["domain"] for row in corpus.summary()] == ["code", "prose"]


def test_a_single_short_file_still_gives_something_to_hold_out(tmp_path: Path) -> None:
    write(tmp_path / "prose" / "book.txt", "".join(f"Sentence number {i} of this text.\n\n" for i in range(100)))
    (domain,) = folder_corpus(tmp_path).domains
    assert 0 < domain.held_out_bytes < domain.train_bytes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has no subfolders; make one for each domain, for example .*/prose/book\.txt"),
        ({"book.txt": "text"}, r"book\.txt lies directly in .*move it into a subfolder"),
        ({"a/readme.md": "text"}, r"domain 'a' has no text; put \.txt or \.jsonl files into"),
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
