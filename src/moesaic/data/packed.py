"""Packed text: token ids in memory-mapped shards, with the places where documents begin, and checksums of it all.

FOLDER/index.json                   what there is; written last, so a folder that has one is whole
FOLDER/tokenizer/                   the tokenizer whose ids these are
FOLDER/000-NAME/train-00000.bin     token ids (little-endian, uint16 or uint32): eos, document, eos, document, ...
FOLDER/000-NAME/train-00000.starts  int64: where in the shard each document begins, at the eos before it
FOLDER/000-NAME/held_out-00000.*    the same for held-out text

A domain's shards, one after another, are its tokens; an eos closes the last one. V vocab.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError

FORMAT = 1
INDEX = "index.json"
TOKENIZER = "tokenizer"
TOKENS_SUFFIX, STARTS_SUFFIX = ".bin", ".starts"
STARTS_DTYPE = np.dtype("<i8")
TOKEN_DTYPES = ("<u2", "<u4")
PARTS = {"train", "held_out"}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One line of the index. `path` without suffix, relative to the folder; `sha256` of (tokens, starts)."""

    path: str
    tokens: int
    documents: int
    sha256: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class PartIndex:
    """What the index says of a domain's training or held-out text. `num_bytes` are UTF-8 bytes of text."""

    num_bytes: int
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        """Token ids in all shards, the eos tokens included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.documents for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class Index:
    """index.json. digest: of the corpus and the tokenizer; equal digests mean equal tokens."""

    source: str
    digest: str
    tokenizer: str
    dtype: str
    domains: dict[str, dict[str, PartIndex]]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all the text, held-out text included."""
        return sum(part.num_bytes for parts in self.domains.values() for part in parts.values())

    def to_json(self) -> str:
        """The text of index.json, with a checksum of itself; `read` is the inverse."""
        tree = {"format": FORMAT, **asdict(self)}
        return json.dumps({**tree, "checksum": _checksum(tree)}, indent=1)

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Raises DataError when there is none, it is damaged, or another version of moesaic wrote it."""
        place = folder / INDEX
        try:
            tree = json.loads(place.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(f"{folder} is no packed text: it has no {INDEX}; make one with `moesaic pack`") from error
        except ValueError as error:
            raise DataError(_damaged(place, folder, "it is not JSON")) from error
        if not isinstance(tree, dict) or tree.pop("checksum", None) != _checksum(tree):
            raise DataError(_damaged(place, folder, "its checksum does not fit"))
        if tree.pop("format", None) != FORMAT:
            raise DataError(f"{folder} was packed by another version of moesaic; pack the text again")
        try:
            domains = {
                name: {part: _part_index(facts) for part, facts in parts.items()}
                for name, parts in tree.pop("domains").items()
            }
            index = cls(domains=domains, **tree)
            _check_index(index)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(_damaged(place, folder, f"{type(error).__name__}: {error}")) from error
        return index


class ShardedTokens:
    """Arrays that stand for one long array."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self.shards = tuple(shards)

    def __len__(self) -> int:
        return sum(map(len, self.shards))


@dataclass(frozen=True, kw_only=True)
class PackedDomain:
    """A domain's token ids, documents in a row: eos, document, eos, document, ..., eos.

    Every token but the first is a target once, so the eos before a document lets its first token be one.
    The starts are where documents begin, at the eos before each; None says wherever an eos stands.
    """

    name: str
    train: np.ndarray | ShardedTokens
    held_out: np.ndarray
    train_starts: np.ndarray | None = None
    held_out_starts: np.ndarray | None = None

    def num_windows(self, sequence_length: int) -> int:
        """Training windows that do not share a target."""
        return max(0, len(self.train) - 1) // sequence_length


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A corpus as tokens of one tokenizer. `byte_lengths` [V] are the text bytes of each token (eos: 0).

    digest: equal digests mean equal tokens; empty for tokens that are not from a folder. sentinel_ids: of the tokens
    that may stand for spans of text, in the order of their numbers.
    """

    domains: tuple[PackedDomain, ...]
    byte_lengths: np.ndarray
    eos_id: int
    digest: str = ""
    sentinel_ids: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The domains' names, in the order that `domain_ids_B` counts."""
        return tuple(domain.name for domain in self.domains)

    @cached_property
    def num_train_tokens(self) -> int:
        """Training tokens of all domains."""
        return sum(len(domain.train) for domain in self.domains)


def is_packed(folder: Path) -> bool:
    """Whether a folder holds packed text rather than text, beside which an index.json of another kind may lie."""
    return (folder / INDEX).is_file() and (folder / TOKENIZER).is_dir()


def open_packed(folder: str | Path) -> Packed:
    """Map a folder of packed text, every byte of it checked.

    Checking costs about a second a gigabyte, once a run. A bit that the disk has lost changes neither the size nor the
    time of a file, so nothing less than reading it would tell.
    Raises DataError that names the file when one is absent, cut short or damaged.
    """
    folder = Path(folder)
    index = Index.read(folder)
    _verify(folder, index)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    if tokenizer.digest != index.tokenizer or tokenizer.eos_id is None:
        raise DataError(_damaged(folder / TOKENIZER, folder, "it is not the tokenizer that the text was packed with"))
    domains = tuple(_open_domain(folder, name, parts, index.dtype) for name, parts in index.domains.items())
    return Packed(
        domains=domains,
        byte_lengths=tokenizer.byte_lengths,
        eos_id=tokenizer.eos_id,
        digest=index.digest,
        sentinel_ids=tokenizer.sentinel_ids,
    )


def document_ids(starts: np.ndarray, first_B: np.ndarray, length: int) -> np.ndarray:
    """Which document each place belongs to, [B, length], counted from 0 in each row of `length` places from `first_B`.

    `starts` are the places where documents begin, ascending.
    """
    low_B = np.searchsorted(starts, first_B, side="right")  # a row that begins with a document is its number 0
    counts_B = np.searchsorted(starts, first_B + length) - low_B
    rows = np.repeat(np.arange(len(first_B)), counts_B)
    which = np.arange(len(rows)) + np.repeat(low_B - np.cumsum(counts_B) + counts_B, counts_B)
    ids = np.zeros((len(first_B), length), dtype=np.int64)
    ids[rows, starts[which] - first_B[rows]] = 1
    return ids.cumsum(axis=1)


def document_starts(tokens: "np.ndarray | ShardedTokens", starts: np.ndarray | None, eos_id: int) -> np.ndarray:
    """Where documents begin: as noted, or else wherever an eos stands."""
    if starts is not None:
        return starts
    shards = tokens.shards if isinstance(tokens, ShardedTokens) else (tokens,)
    return np.flatnonzero(np.concatenate(shards) == eos_id)


def packed_digest(corpus_digest: str, tokenizer_digest: str) -> str:
    """The digest of what packing this corpus with this tokenizer gives."""
    return hashlib.sha256(f"{FORMAT} {corpus_digest} {tokenizer_digest}".encode()).hexdigest()


def _open_domain(folder: Path, name: str, parts: Mapping[str, PartIndex], dtype: str) -> PackedDomain:
    train, held_out = parts["train"], parts["held_out"]
    return PackedDomain(
        name=name,
        train=ShardedTokens(_map(folder, train, TOKENS_SUFFIX, np.dtype(dtype))),
        held_out=_joined(_map(folder, held_out, TOKENS_SUFFIX, np.dtype(dtype)), np.dtype(dtype)),
        train_starts=_starts(folder, train),
        held_out_starts=_starts(folder, held_out),
    )


def _map(folder: Path, part: PartIndex, suffix: str, dtype: np.dtype) -> list[np.ndarray]:
    """As plain arrays: the subclass that memmap returns makes every slice of it slow."""
    paths = (folder / (shard.path + suffix) for shard in part.shards)
    return [
        np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
        if path.stat().st_size  # nothing cannot be mapped
        else np.empty(0, dtype=dtype)
        for path in paths
    ]


def _joined(arrays: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)


def _starts(folder: Path, part: PartIndex) -> np.ndarray:
    """Where the documents begin in all of the part's tokens."""
    before, pieces = 0, []
    for shard, starts in zip(part.shards, _map(folder, part, STARTS_SUFFIX, STARTS_DTYPE), strict=True):
        pieces.append(starts + before)
        before += shard.tokens
    return _joined(pieces, STARTS_DTYPE)


def _verify(folder: Path, index: Index) -> None:
    """Compare every file with the index, several at a time: hashing lets other threads run."""
    files = list(_expected_files(folder, index))
    if not files:
        return
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        for (path, _, _), wrong in zip(files, threads.map(_what_is_wrong, *zip(*files, strict=True)), strict=True):
            if wrong:
                raise DataError(_damaged(path, folder, wrong))


def _expected_files(folder: Path, index: Index) -> Iterator[tuple[Path, int, str]]:
    itemsizes = ((TOKENS_SUFFIX, np.dtype(index.dtype).itemsize), (STARTS_SUFFIX, STARTS_DTYPE.itemsize))
    for parts in index.domains.values():
        for shard in (shard for part in parts.values() for shard in part.shards):
            counts = (shard.tokens, shard.documents)
            for (suffix, itemsize), count, sha256 in zip(itemsizes, counts, shard.sha256, strict=True):
                yield folder / (shard.path + suffix), count * itemsize, sha256


def _what_is_wrong(path: Path, size: int, sha256: str) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"it has {found} bytes and should have {size}"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None if digest == sha256 else f"its sha256 is {digest[:12]}… and should be {sha256[:12]}…"


def _damaged(path: Path, folder: Path, wrong: str) -> str:
    return f"{path} is damaged ({wrong}); delete {folder} and pack the text again"


def _part_index(facts: dict[str, Any]) -> PartIndex:
    shards = tuple(Shard(**{**shard, "sha256": tuple(shard["sha256"])}) for shard in facts["shards"])
    return PartIndex(num_bytes=facts["num_bytes"], shards=shards)


def _check_index(index: Index) -> None:
    """Raises ValueError for what `pack` never writes, such as a path that leads out of the folder."""
    if index.dtype not in TOKEN_DTYPES:
        raise ValueError(f"dtype={index.dtype!r}")
    for name, parts in index.domains.items():
        if parts.keys() != PARTS:
            raise ValueError(f"the parts of {name!r} are {sorted(parts)}")
        for shard in (shard for part in parts.values() for shard in part.shards):
            path = PurePosixPath(shard.path)
            if path.is_absolute() or ".." in path.parts or "\0" in shard.path or not path.name:
                raise ValueError(f"the path {shard.path!r}")
            if len(shard.sha256) != 2 or min(shard.tokens, shard.documents) < 0:
                raise ValueError(f"the numbers of {shard.path!r}")


def _checksum(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
