"""From text to packed shards: tokenized in parallel, written beside, and moved into place when whole.

Finished shards are noted in a journal, so that a run that was killed goes on after the last of them.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moesaic.data.corpus import HELD_OUT, TRAIN, Corpus, Domain
from moesaic.data.packed import INDEX, TOKENIZER, Index, Packed, PartIndex, is_packed, open_packed, packed_digest
from moesaic.data.pieces import ids_dtype
from moesaic.data.shard_writer import JOURNAL, LOCK, Job, Key, ShardWriter
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.workers import encoder, refuse_unguarded_main
from moesaic.errors import DataError, RunFolderError

SHARD_TOKENS = 1 << 26  # 128 MB of two-byte ids: a file one can copy, and few enough of them
PART_NAMES = {TRAIN: "train", HELD_OUT: "held_out"}

_BATCH_CHARS, _BATCH_DOCUMENTS = 1 << 18, 256  # sent to a worker at a time
_WORKER_BYTES = 8_000_000  # of text for each worker process; less is tokenized sooner than one starts


class Packing(NamedTuple):
    """How far packing is: documents and UTF-8 bytes of text so far, those of an earlier attempt included."""

    documents: int
    num_bytes: int


class _Tag(NamedTuple):
    """What goes to a worker: documents of one part, and their bytes of text."""

    key: Key
    num_bytes: int


def pack(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    listen: Callable[[Packing], None] | None = None,
) -> Packed:
    """Tokenize a corpus into `folder` and open it; what is there already is only opened.

    The files depend on the corpus, the tokenizer and `shard_tokens` alone, not on `workers`. A run that is stopped
    leaves `.NAME.packing` beside, from which the next one goes on. A second process waits for the first.
    Raises DataError when the tokenizer has no eos token or is not byte-level, RunFolderError when the folder holds
    something else or cannot be written.
    """
    folder = Path(folder)
    if shard_tokens < 1:
        raise DataError(f"shard_tokens={shard_tokens}; use 1 or more")
    if tokenizer.eos_id is None:
        raise DataError("the tokenizer has no eos token to put between documents; name one in tokenizer_config.json")
    _ = tokenizer.byte_lengths  # a vocabulary that cannot be measured is refused before the work, not after it
    digest = packed_digest(corpus.digest, tokenizer.digest)
    if not _is_there(folder, digest):
        refuse_unguarded_main()  # before the lock, which the parent holds
        with _writing(folder), _workplace(folder) as work:
            if _is_there(folder, digest):  # the process that was waited for has made it
                shutil.rmtree(work, ignore_errors=True)
            else:
                index = _pack_parts(corpus, tokenizer, digest, Job(work, digest, shard_tokens), workers, listen)
                _finish(work, index, tokenizer, folder)
    return open_packed(folder)


def _is_there(folder: Path, digest: str) -> bool:
    if is_packed(folder):
        if Index.read(folder).digest == digest:
            return True
        raise RunFolderError(f"{folder} holds other packed text; delete it or choose another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} is not an empty folder; choose another one")
    return False


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"cannot write {folder}: {error.strerror or error}; free some space or choose another folder (for the "
            "cache, set MOESAIC_CACHE to another folder)"
        ) from error


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """The folder beside, for this process alone."""
    work = folder.absolute().with_name(f".{folder.absolute().name}.packing")
    work.mkdir(parents=True, exist_ok=True)
    with (work / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield work


def _pack_parts(
    corpus: Corpus,
    tokenizer: Tokenizer,
    digest: str,
    job: Job,
    workers: int,
    listen: Callable[[Packing], None] | None,
) -> Index:
    dtype = ids_dtype(tokenizer)
    eos = np.array([tokenizer.eos_id], dtype=dtype)
    writers: dict[Key, ShardWriter] = {}
    done = _done_before(corpus, job)
    try:
        with encoder(tokenizer, min(workers, 1 + corpus.num_bytes // _WORKER_BYTES)) as encode:
            for tag, encoded in encode(_batches(corpus, job)):
                if writers and next(iter(writers)).domain != tag.key.domain:
                    _finish_all(writers)
                if tag.key not in writers:
                    writers[tag.key] = ShardWriter(job, tag.key, _prefix(corpus, tag.key), eos)
                writers[tag.key].add(encoded)
                done = Packing(done.documents + len(encoded.lengths), done.num_bytes + tag.num_bytes)
                if listen:
                    listen(done)
        _finish_all(writers)
    finally:
        for writer in writers.values():
            writer.abandon()
    return _index(corpus, tokenizer, digest, dtype, job)


def _finish_all(writers: dict[Key, ShardWriter]) -> None:
    for writer in writers.values():
        writer.finish()
    writers.clear()


def _done_before(corpus: Corpus, job: Job) -> Packing:
    documents = num_bytes = 0
    for key in job.shards:
        domain = corpus.domains[key.domain]
        sizes = domain.sizes[np.frombuffer(domain.parts, dtype=np.uint8) == key.part]
        documents += job.documents(key)
        num_bytes += int(sizes[: job.documents(key)].sum())
    return Packing(documents, num_bytes)


def _batches(corpus: Corpus, job: Job) -> Iterator[tuple[_Tag, list[str]]]:
    """Documents that are not in finished shards, in batches of one part each."""
    for number, domain in enumerate(corpus.domains):
        if not all(Key(number, part) in job.complete for part in PART_NAMES):
            yield from _domain_batches(number, domain, job)


def _domain_batches(number: int, domain: Domain, job: Job) -> Iterator[tuple[_Tag, list[str]]]:
    skip = {part: job.documents(Key(number, part)) for part in PART_NAMES}
    waiting: dict[int, list[str]] = {part: [] for part in PART_NAMES}
    for part, text in domain.split_documents():
        if skip[part]:
            skip[part] -= 1
            continue
        waiting[part].append(text)
        if len(waiting[part]) == _BATCH_DOCUMENTS or sum(map(len, waiting[part])) >= _BATCH_CHARS:
            yield _batch(number, part, waiting[part])
            waiting[part] = []
    for part, texts in waiting.items():
        if texts:
            yield _batch(number, part, texts)


def _batch(number: int, part: int, texts: list[str]) -> tuple[_Tag, list[str]]:
    return _Tag(Key(number, part), sum(len(text.encode()) for text in texts)), texts


def _prefix(corpus: Corpus, key: Key) -> str:
    """Numbered, since names that differ may be alike as file names."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in corpus.domains[key.domain].name)
    return f"{key.domain:03d}-{name}/{PART_NAMES[key.part]}"


def _index(corpus: Corpus, tokenizer: Tokenizer, digest: str, dtype: np.dtype, job: Job) -> Index:
    domains = {}
    for number, domain in enumerate(corpus.domains):
        sizes = {TRAIN: domain.train.num_bytes, HELD_OUT: domain.held_out.num_bytes}
        domains[domain.name] = {
            name: PartIndex(num_bytes=sizes[part], shards=tuple(job.shards[Key(number, part)]))
            for part, name in PART_NAMES.items()
        }
    return Index(source=corpus.source, digest=digest, tokenizer=tokenizer.digest, dtype=dtype.str, domains=domains)


def _finish(work: Path, index: Index, tokenizer: Tokenizer, folder: Path) -> None:
    """Everything on the disk first, then the name that says so."""
    tokenizer.save(work / TOKENIZER)
    (work / INDEX).write_text(index.to_json(), encoding="utf-8")
    for path in [work / INDEX, *(work / TOKENIZER).iterdir(), *(p for p in work.iterdir() if p.is_dir()), work]:
        _sync(path)
    work.rename(folder.absolute())
    _sync(folder.absolute().parent)
    (folder / JOURNAL).unlink()
    (folder / LOCK).unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
