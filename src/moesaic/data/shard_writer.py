"""Shards on their way to the disk: written and hashed at once, and noted in a journal when they are whole."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moesaic.data.packed import STARTS_DTYPE, STARTS_SUFFIX, TOKENS_SUFFIX, Shard
from moesaic.data.pieces import Encoded

JOURNAL, LOCK = "journal.jsonl", ".lock"


class Key(NamedTuple):
    """Which shards: those of a domain's training or held-out text."""

    domain: int
    part: int


class Job:
    """The work folder with its journal: a header line, then a line for each finished shard."""

    def __init__(self, work: Path, digest: str, shard_tokens: int) -> None:
        self.work, self.shard_tokens = work, shard_tokens
        self.shards: dict[Key, list[Shard]] = {}
        self.complete: set[Key] = set()
        header = {"digest": digest, "shard_tokens": shard_tokens}
        if not self._read_journal(header):
            for entry in work.iterdir():
                if entry.name != LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self._note(header)

    def finished(self, key: Key, shard: Shard, is_last: bool) -> None:
        """Remember a shard that is on the disk."""
        self._note({"key": key, "shard": asdict(shard), "is_last": is_last})
        self._remember(key, shard, is_last)

    def documents(self, key: Key) -> int:
        """Of this part, in finished shards."""
        return sum(shard.documents for shard in self.shards.get(key, []))

    def _remember(self, key: Key, shard: Shard, is_last: bool) -> None:
        self.shards.setdefault(key, []).append(shard)
        if is_last:
            self.complete.add(key)

    def _read_journal(self, header: dict) -> bool:
        """Whether there is a whole one of the same job. A last line that was cut short does not count."""
        place = self.work / JOURNAL
        whole = place.read_bytes().rpartition(b"\n")[0] if place.exists() else b""
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError:  # damaged: what it lists cannot be trusted
            return False
        if not lines or lines[0] != header:
            return False
        os.truncate(place, len(whole) + 1)
        for line in lines[1:]:
            shard = Shard(**{**line["shard"], "sha256": tuple(line["shard"]["sha256"])})
            self._remember(Key(*line["key"]), shard, line["is_last"])
        return True

    def _note(self, line: dict) -> None:
        with (self.work / JOURNAL).open("a") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())


class _HashedFile:
    """A file and the sha256 of what was written to it."""

    def __init__(self, path: Path) -> None:
        self._file, self._hash = path.open("wb"), hashlib.sha256()

    def write(self, values: np.ndarray) -> None:
        data = values.tobytes()
        self._file.write(data)
        self._hash.update(data)

    def close(self) -> str:
        """Make it durable; returns the sha256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        self._file.close()


class ShardWriter:
    """Writes the shards of one part. A shard is closed before the first document that begins beyond its size."""

    def __init__(self, job: Job, key: Key, prefix: str, eos: np.ndarray) -> None:
        self._job, self._key, self._prefix, self._eos = job, key, prefix, eos
        self._files: tuple[_HashedFile, _HashedFile] | None = None
        self._path, self._tokens, self._documents = "", 0, 0

    def add(self, encoded: Encoded) -> None:
        """Append documents, to a new shard where the one before is full."""
        begins = np.cumsum(encoded.lengths) - encoded.lengths
        first = 0
        while first < len(begins):
            if self._files and self._tokens >= self._job.shard_tokens:
                self._close(is_last=False)
            tokens_file, starts_file = self._files or self._open()
            starts = begins[first:] - begins[first] + self._tokens
            count = int(np.searchsorted(starts, self._job.shard_tokens))
            end = begins[first + count] if first + count < len(begins) else len(encoded.ids)
            tokens_file.write(encoded.ids[begins[first] : end])
            starts_file.write(starts[:count].astype(STARTS_DTYPE))
            self._tokens += int(end - begins[first])
            self._documents += count
            first += count

    def finish(self) -> None:
        """Write the eos that closes the part, and close its last shard."""
        assert self._files, "the split puts documents into both parts of every domain"
        self._files[0].write(self._eos)
        self._tokens += 1
        self._close(is_last=True)

    def abandon(self) -> None:
        """Close the files of an unfinished shard, which the next attempt writes anew."""
        for file in self._files or ():
            file.abandon()

    def _open(self) -> tuple[_HashedFile, _HashedFile]:
        self._path = f"{self._prefix}-{len(self._job.shards.get(self._key, [])):05d}"
        place = self._job.work / self._path
        place.parent.mkdir(exist_ok=True)
        self._files = (
            _HashedFile(place.with_name(place.name + TOKENS_SUFFIX)),
            _HashedFile(place.with_name(place.name + STARTS_SUFFIX)),
        )
        self._tokens = self._documents = 0
        return self._files

    def _close(self, is_last: bool) -> None:
        assert self._files
        tokens, starts = self._files
        sha256 = (tokens.close(), starts.close())
        shard = Shard(path=self._path, tokens=self._tokens, documents=self._documents, sha256=sha256)
        self._job.finished(self._key, shard, is_last)
        self._files = None
