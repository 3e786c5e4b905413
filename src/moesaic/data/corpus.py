"""A corpus: labelled domains of text, each with documents to train on and documents held out."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moesaic.errors import DataError

Progress = Callable[[str], None]

HELD_OUT_SHARE = 0.05
MIN_HELD_OUT_BYTES = 100_000  # below this, a domain's loss is noise between two small models
MAX_HELD_OUT_BYTES = 400_000
MAX_HELD_OUT_SHARE = 0.2  # of a small domain, which would otherwise have nothing left to train on

# A domain of fewer documents than this is cut at paragraph ends, so that a part of it can be held out.
MIN_DOCUMENTS = 20
CUT_BYTES = 16_384
MIN_CUT_BYTES = 256

_FOLDER_EXAMPLE = "for example {}/prose/book.txt and {}/code/program.txt"


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One kind of text. No held-out document is in `train`."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @cached_property
    def train_bytes(self) -> int:
        """UTF-8 bytes of the training documents."""
        return sum(map(_num_bytes, self.train))

    @cached_property
    def held_out_bytes(self) -> int:
        """UTF-8 bytes of the held-out documents."""
        return sum(map(_num_bytes, self.held_out))


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Domains in the order of their names. `source` says in words where the text is from."""

    source: str
    domains: tuple[Domain, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents, held-out ones included."""
        return sum(domain.train_bytes + domain.held_out_bytes for domain in self.domains)

    @cached_property
    def digest(self) -> str:
        """sha256 over names, documents, order and split: equal digests mean equal corpora."""
        total = hashlib.sha256()
        for domain in self.domains:
            total.update(f"{domain.name}\0{len(domain.train)}\0{len(domain.held_out)}\0".encode())
            for text in (*domain.train, *domain.held_out):
                total.update(_sha256(text))
        return total.hexdigest()

    def summary(self) -> list[dict[str, str | int]]:
        """One JSON-ready row a domain: its documents and bytes, for training and held out."""
        return [
            {
                "domain": domain.name,
                "train_documents": len(domain.train),
                "train_bytes": domain.train_bytes,
                "held_out_documents": len(domain.held_out),
                "held_out_bytes": domain.held_out_bytes,
            }
            for domain in self.domains
        ]


def build_corpus(source: str, documents: Mapping[str, Iterable[str]]) -> Corpus:
    """Split each domain's documents into training and held-out ones.

    A document that occurred before, in any domain, is dropped.
    Raises DataError for a domain of fewer than two documents.
    """
    seen: set[bytes] = set()
    domains = []
    for name in sorted(documents):
        unique = [text for text in documents[name] if text.strip() and _is_new(text, seen)]
        if len(unique) < 2:
            raise DataError(
                f"domain {name!r} has {len(unique)} different documents; it needs at least 2 to hold one out: "
                "give it more text"
            )
        domains.append(_split(name, unique))
    if not domains:
        raise DataError(f"{source} has no domains; give at least one")
    return Corpus(source=source, domains=tuple(domains))


def folder_corpus(path: str | Path) -> Corpus:
    """Read a folder with one subfolder a domain, of .txt files (one document each) or .jsonl files (field "text").

    A domain of few documents is cut at paragraph ends, so that a part of it can be held out even from a single file.
    Raises DataError for folders that are missing, empty or arranged otherwise, and for files that cannot be read.
    """
    folder = Path(path)
    domains = _domain_folders(folder)
    return build_corpus(str(folder), {domain.name: _domain_documents(domain) for domain in domains})


def cut(text: str, num_chars: int) -> Iterator[str]:
    """Cut a long text into pieces of `num_chars` to twice as many characters, at a paragraph's end where there is one.

    The pieces joined are the text.
    """
    start = 0
    while len(text) - start > 2 * num_chars:
        end = _cut_point(text, start + num_chars, start + 2 * num_chars)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _cut_point(text: str, low: int, high: int) -> int:
    for pattern in (r"\n\s*\n", r"\n", r"\s"):
        if found := re.compile(pattern).search(text, low, high):
            return found.end()
    return high


def _num_bytes(text: str) -> int:
    return len(text.encode())


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = _sha256(text)
    if digest in seen:
        return False
    seen.add(digest)
    return True


def _split(name: str, documents: Sequence[str]) -> Domain:
    """Hold out documents in the order of their hashes, so that the choice depends on the texts alone."""
    total = sum(map(_num_bytes, documents))
    wanted = max(MIN_HELD_OUT_BYTES, min(MAX_HELD_OUT_BYTES, round(total * HELD_OUT_SHARE)))
    wanted = min(wanted, round(total * MAX_HELD_OUT_SHARE))
    chosen: set[int] = set()
    held = 0
    for index in sorted(range(len(documents)), key=lambda i: _sha256(documents[i])):
        size = _num_bytes(documents[index])
        if held + size <= wanted * 1.25:
            chosen.add(index)
            held += size
        if held >= wanted:
            break
    if not chosen:
        chosen.add(min(range(len(documents)), key=lambda i: (_num_bytes(documents[i]), i)))
    return Domain(
        name=name,
        train=tuple(text for i, text in enumerate(documents) if i not in chosen),
        held_out=tuple(text for i, text in enumerate(documents) if i in chosen),
    )


def _is_text_file(path: Path) -> bool:
    return path.is_file() and path.suffix in (".txt", ".jsonl") and not path.name.startswith(".")


def _domain_folders(folder: Path) -> list[Path]:
    example = _FOLDER_EXAMPLE.format(folder, folder)
    if not folder.exists():
        raise DataError(f"no folder {folder}; give one with a subfolder for each domain, {example}")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; give a folder with a subfolder for each domain, {example}")
    children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    loose = [child.name for child in children if _is_text_file(child)]
    if loose:
        raise DataError(f"{loose[0]} lies directly in {folder}; move it into a subfolder for its domain, {example}")
    domains = [child for child in children if child.is_dir()]
    if not domains:
        raise DataError(f"{folder} has no subfolders; make one for each domain, {example}")
    return domains


def _domain_documents(folder: Path) -> list[str]:
    files = sorted((path for path in folder.rglob("*") if _is_text_file(path)), key=lambda path: path.as_posix())
    texts = [text for path in files for text in _file_documents(path) if text.strip()]
    if not texts:
        raise DataError(f"domain {folder.name!r} has no text; put .txt or .jsonl files into {folder}, or remove it")
    if len(texts) >= MIN_DOCUMENTS:
        return texts
    size = max(MIN_CUT_BYTES, min(CUT_BYTES, sum(map(len, texts)) // (2 * MIN_DOCUMENTS)))
    return [piece for text in texts for piece in cut(text, size)]


def _file_documents(path: Path) -> Iterator[str]:
    text = _read_utf8(path)
    if path.suffix == ".txt":
        yield text
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _jsonl_text(path, number, line)


def _read_utf8(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; make it readable or remove it") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {error.start} (0x{data[error.start]:02x}); convert it, for example with "
            f"iconv -f LATIN1 -t UTF-8"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _jsonl_text(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} line {number} is not JSON ({error.msg} at column {error.colno}); "
            'each line must be an object like {"text": "..."}'
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        seen = f"fields {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(
            f'{path} line {number} has no string "text" ({seen}); each line must be an object like {{"text": "..."}}'
        )
    return row["text"]
