"""A corpus: labelled domains of text, each with documents to train on and documents held out.

The text is streamed and never kept: a survey reads all of it once, remembers 32 bytes of hash and a size for each
document, and from these alone decides what is a repetition and what is held out. Reading the text again applies that
plan, so one rule serves a shelf of books and a crawl.
"""

import hashlib
import itertools
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moesaic.data.sources import FORMATS, is_text_file, read_documents
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

DROPPED, TRAIN, HELD_OUT = range(3)  # what becomes of a document

_DIGEST_BYTES = 32
_FOLDER_EXAMPLE = "for example {}/prose/book.txt and {}/code/program.txt"
_TOLD_EVERY = 1000  # documents


class Reading(NamedTuple):
    """How far a long reading is. `num_bytes` are UTF-8 bytes of text."""

    documents: int
    num_bytes: int


Listener = Callable[[Reading], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Domain:
    """One kind of text. `documents` can be read again and again and are always the same.

    sizes: UTF-8 bytes of each document. digests: their sha256, one after another. parts: DROPPED, TRAIN or HELD_OUT.
    """

    name: str
    documents: Iterable[str]
    sizes: np.ndarray
    digests: bytes
    parts: bytes

    @property
    def train(self) -> "Part":
        """The documents to train on."""
        return Part(self, TRAIN)

    @property
    def held_out(self) -> "Part":
        """The documents that are held out."""
        return Part(self, HELD_OUT)

    def split_documents(self) -> Iterator[tuple[int, str]]:
        """(TRAIN or HELD_OUT, text) in order. Raises DataError when the text is not the one that was surveyed."""
        number = 0
        for number, text in enumerate(_not_blank(self.documents), start=1):
            if _sha256(text) != self.digests[(number - 1) * _DIGEST_BYTES : number * _DIGEST_BYTES]:
                raise self._changed()
            if self.parts[number - 1] != DROPPED:
                yield self.parts[number - 1], text
        if number != len(self.parts):
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(f"the text of domain {self.name!r} changed while it was read; let it rest and run again")


class Part:
    """The documents of a domain to train on, or those held out: read from the source each time they are wanted."""

    def __init__(self, domain: Domain, part: int) -> None:
        self._domain, self._part = domain, part
        self._chosen = np.frombuffer(domain.parts, dtype=np.uint8) == part

    def __iter__(self) -> Iterator[str]:
        return (text for part, text in self._domain.split_documents() if part == self._part)

    def __len__(self) -> int:
        return int(self._chosen.sum())

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents."""
        return int(self._domain.sizes[self._chosen].sum())

    @property
    def digests(self) -> bytes:
        """The sha256 of each document, one after another."""
        return np.frombuffer(self._domain.digests, dtype=f"V{_DIGEST_BYTES}")[self._chosen].tobytes()


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Domains in the order of their names. `source` says in words where the text is from.

    digest: sha256 over names, documents, order and split: equal digests mean equal corpora.
    """

    source: str
    domains: tuple[Domain, ...]
    digest: str

    @property
    def names(self) -> tuple[str, ...]:
        """The domains' names, sorted."""
        return tuple(domain.name for domain in self.domains)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents, held-out ones included."""
        return sum(domain.train.num_bytes + domain.held_out.num_bytes for domain in self.domains)


def build_corpus(source: str, documents: Mapping[str, Iterable[str]], *, listen: Listener | None = None) -> Corpus:
    """Split each domain's documents into training and held-out ones, reading them once. They must be re-readable.

    A document that occurred before, in any domain, is dropped.
    Raises DataError for a domain of fewer than two documents.
    """
    surveys, read = {}, Reading(0, 0)
    for name in sorted(documents):
        surveys[name], read = _survey(documents[name], read, listen)
    if not surveys:
        raise DataError(f"{source} has no domains; give at least one")
    is_new = _first_of_their_kind(b"".join(survey.digests for survey in surveys.values()))
    domains, first = [], 0
    for name, survey in surveys.items():
        parts = _split(name, survey, is_new[first : first + len(survey.sizes)])
        first += len(survey.sizes)
        domains.append(
            Domain(name=name, documents=documents[name], sizes=survey.sizes, digests=survey.digests, parts=parts)
        )
    return Corpus(source=source, domains=tuple(domains), digest=_digest(domains))


def folder_corpus(path: str | Path, *, listen: Listener | None = None) -> Corpus:
    """Survey a folder with one subfolder a domain, of files in the formats of `sources`.

    A domain of few documents is cut at paragraph ends, so that a part of it can be held out even from a single file.
    Raises DataError for folders that are missing, empty or arranged otherwise, and for files that cannot be read.
    """
    folder = Path(path)
    domains = {domain.name: DomainFolder(domain) for domain in _domain_folders(folder)}
    return build_corpus(str(folder), domains, listen=listen)


class DomainFolder:
    """The documents of one folder's files, in the order of their paths."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Iterator[str]:
        files = sorted(
            (path for path in self.folder.rglob("*") if is_text_file(path)), key=lambda path: path.as_posix()
        )
        texts = _not_blank(text for path in files for text in read_documents(path))
        first = list(itertools.islice(texts, MIN_DOCUMENTS))
        if not first:
            raise DataError(
                f"domain {self.folder.name!r} has no text; put {FORMATS} files into {self.folder}, or remove it"
            )
        if len(first) == MIN_DOCUMENTS:
            yield from itertools.chain(first, texts)
            return
        size = max(MIN_CUT_BYTES, min(CUT_BYTES, sum(map(len, first)) // (2 * MIN_DOCUMENTS)))
        for text in first:
            yield from cut(text, size)


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


class _Survey(NamedTuple):
    sizes: np.ndarray
    digests: bytes


def _survey(documents: Iterable[str], read: Reading, listen: Listener | None) -> tuple[_Survey, Reading]:
    sizes, digests = array("q"), bytearray()
    for text in _not_blank(documents):
        data = text.encode()
        sizes.append(len(data))
        digests += hashlib.sha256(data).digest()
        read = Reading(read.documents + 1, read.num_bytes + len(data))
        if listen and read.documents % _TOLD_EVERY == 0:
            listen(read)
    if listen:
        listen(read)
    return _Survey(np.array(sizes, dtype=np.int64), bytes(digests)), read


def _not_blank(documents: Iterable[str]) -> Iterator[str]:
    return (text for text in documents if text and not text.isspace())


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _by_hash(digests: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The order of the documents by hash, equal ones as they came, and the first 16 bytes of each hash as two words."""
    words = np.frombuffer(digests, dtype=">u8").reshape(-1, 4)[:, :2].astype(np.uint64)
    return np.lexsort((words[:, 1], words[:, 0])), words


def _first_of_their_kind(digests: bytes) -> np.ndarray:
    order, words = _by_hash(digests)
    is_new = np.ones(len(order), dtype=bool)
    is_new[order[1:]] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    return is_new


def _split(name: str, survey: _Survey, is_new: np.ndarray) -> bytes:
    """Hold out documents in the order of their hashes, so that the choice depends on the texts alone."""
    if is_new.sum() < 2:
        raise DataError(
            f"domain {name!r} has {is_new.sum()} different documents; it needs at least 2 to hold one out: "
            "give it more text"
        )
    parts = np.where(is_new, TRAIN, DROPPED).astype(np.uint8)
    total = int(survey.sizes[is_new].sum())
    wanted = max(MIN_HELD_OUT_BYTES, min(MAX_HELD_OUT_BYTES, round(total * HELD_OUT_SHARE)))
    wanted = min(wanted, round(total * MAX_HELD_OUT_SHARE))
    order, _ = _by_hash(survey.digests)
    held = 0
    for index in order[is_new[order]]:
        size = int(survey.sizes[index])
        if held + size <= wanted * 1.25:
            parts[index] = HELD_OUT
            held += size
        if held >= wanted:
            break
    if not held:
        parts[np.argmin(np.where(is_new, survey.sizes, np.iinfo(np.int64).max))] = HELD_OUT
    return parts.tobytes()


def _digest(domains: Iterable[Domain]) -> str:
    total = hashlib.sha256()
    for domain in domains:
        total.update(f"{domain.name}\0{len(domain.train)}\0{len(domain.held_out)}\0".encode())
        total.update(domain.train.digests)
        total.update(domain.held_out.digests)
    return total.hexdigest()


def _domain_folders(folder: Path) -> list[Path]:
    example = _FOLDER_EXAMPLE.format(folder, folder)
    if not folder.exists():
        raise DataError(f"no folder {folder}; give one with a subfolder for each domain, {example}")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; give a folder with a subfolder for each domain, {example}")
    children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    loose = [child.name for child in children if is_text_file(child)]
    if loose:
        raise DataError(f"{loose[0]} lies directly in {folder}; move it into a subfolder for its domain, {example}")
    domains = [child for child in children if child.is_dir()]
    if not domains:
        raise DataError(f"{folder} has no subfolders; make one for each domain, {example}")
    return domains
