"""Packing: what is in the files, and that neither workers nor interruptions change it."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from moesaic.data.corpus import Corpus, build_corpus
from moesaic.data.packed import Index, Packed, ShardedTokens, is_packed
from moesaic.data.packing import Packing, pack
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError, RunFolderError
from tests.full_disk import full_disk


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def all_tokens(tokens: np.ndarray | ShardedTokens) -> np.ndarray:
    return np.concatenate(tokens.shards) if isinstance(tokens, ShardedTokens) else tokens


@pytest.mark.parametrize("which", ["packed", "packed_in_shards"])
def test_packed_domains_are_documents_between_eos_tokens(
    corpus: Corpus, tokenizer: Tokenizer, which: str, request: pytest.FixtureRequest
) -> None:
    packed: Packed = request.getfixturevalue(which)
    assert packed.names == corpus.names == ("code", "prose")
    for domain, text in zip(packed.domains, corpus.domains, strict=True):
        for tokens, starts, part in (
            (domain.train, domain.train_starts, text.train),
            (domain.held_out, domain.held_out_starts, text.held_out),
        ):
            ids = all_tokens(tokens)
            assert starts is not None and len(starts) == len(part)
            pieces = [ids[a:b] for a, b in itertools.pairwise([*starts, len(ids) - 1])]
            assert all(piece[0] == 0 for piece in pieces) and ids[-1] == 0
            assert [tokenizer.decode(piece[1:].tolist()) for piece in pieces] == list(part)
            assert ids.dtype == np.uint16
        assert packed.byte_lengths[domain.held_out].sum() == text.held_out.num_bytes


def test_shards_are_closed_at_the_first_document_beyond_their_size(packed_in_shards: Packed) -> None:
    for domain in packed_in_shards.domains:
        assert isinstance(domain.train, ShardedTokens)
        *full, last = map(len, domain.train.shards)
        assert len(full) > 3 and all(100 <= size < 200 for size in full) and last < 200
        assert all(shard[0] == 0 for shard in domain.train.shards)


def test_the_index_says_what_there_is(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    packed = pack(corpus, tokenizer, tmp_path / "p", shard_tokens=100)
    index = Index.read(tmp_path / "p")
    assert index.digest == packed.digest and index.tokenizer == tokenizer.digest
    assert index.num_bytes == corpus.num_bytes
    for domain, text in zip(packed.domains, corpus.domains, strict=True):
        train = index.domains[domain.name]["train"]
        assert train.tokens == len(domain.train) and train.documents == len(text.train)
        assert train.num_bytes == text.train.num_bytes
    assert not list((tmp_path / "p").glob(".*")) and [path.name for path in tmp_path.iterdir()] == ["p"]


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=40),
    shard_tokens=st.integers(1, 120),
    batch=st.integers(1, 9),
)
def test_any_documents_come_back_from_any_shards(
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    shard_tokens: int,
    batch: int,
) -> None:
    texts = [f"{number}:" + "x" * size for number, size in enumerate(sizes)]
    text = build_corpus("test", {"d": texts})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.data.packing._BATCH_DOCUMENTS", batch)
        (domain,) = pack(text, tokenizer, tmp_path_factory.mktemp("any") / "p", shard_tokens=shard_tokens).domains
    ids, starts = all_tokens(domain.train), domain.train_starts
    assert starts is not None
    found = [tokenizer.decode(ids[a:b].tolist()) for a, b in itertools.pairwise([*starts, len(ids)])]
    assert found == list(text.domains[0].train)


def test_workers_change_nothing_and_come_from_a_script(tmp_path: Path) -> None:
    """More text than one process would take by itself; the worker processes start afresh."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from moesaic.data import packing\n"
        "from moesaic.data.corpus import build_corpus\n"
        "from moesaic.data.tokenizer import Tokenizer\n"
        "if __name__ == '__main__':\n"
        "    packing._WORKER_BYTES, packing._BATCH_DOCUMENTS = 1, 7\n"
        "    texts = [f'{i} of {i**3} ' * 9 for i in range(400)]\n"
        "    corpus = build_corpus('test', {'a': texts[:300], 'b': texts[300:]})\n"
        "    tokenizer = Tokenizer.train(texts, 300)\n"
        "    packing.pack(corpus, tokenizer, sys.argv[1], workers=int(sys.argv[2]), shard_tokens=3000)\n"
    )
    for workers in (1, 3):
        command = [sys.executable, str(script), str(tmp_path / str(workers)), str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    assert len(files(tmp_path / "1")) > 12
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_a_script_without_its_guard_is_told_so(tmp_path: Path) -> None:
    """Its workers run it again and meet the lock that it holds: they must not wait for it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from moesaic.data import packing\n"
        "from moesaic.data.corpus import build_corpus\n"
        "from moesaic.data.tokenizer import Tokenizer\n"
        "packing._WORKER_BYTES = 1\n"
        "texts = [f'{i} of {i**3}' for i in range(40)]\n"
        "corpus = build_corpus('test', {'a': texts})\n"
        "packing.pack(corpus, Tokenizer.train(texts, 300), sys.argv[1], workers=2)\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "p")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and 'put that under `if __name__ == "__main__":`' in done.stderr
    assert "DataError: a process that tokenizes ended" in done.stderr


def test_packed_text_is_kept_and_only_opened_again(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    told: list[Packing] = []
    pack(corpus, tokenizer, tmp_path / "p", listen=told.append)
    assert told[-1] == Packing(320, corpus.num_bytes)
    before, count = files(tmp_path), len(told)
    pack(corpus, tokenizer, tmp_path / "p", listen=told.append)
    assert len(told) == count and files(tmp_path) == before


class StoppedError(Exception):
    pass


def test_a_stopped_run_goes_on_and_gives_the_same_files(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Stopped after 1, 2, 3, ... batches: what is there is never taken for whole, and the end is always the same."""
    pack(corpus, tokenizer, tmp_path / "whole", shard_tokens=300)
    expected = files(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.data.packing._BATCH_DOCUMENTS", 32)
        first_told, stop_after = set(), 0
        for stop_after in itertools.count(1):
            out = tmp_path / "out"
            try:
                pack(corpus, tokenizer, out, shard_tokens=300, listen=stop_at(stop_after))
            except StoppedError:
                assert not out.exists()
                told: list[Packing] = []
                pack(corpus, tokenizer, out, shard_tokens=300, listen=told.append)
                first_told.add(told[0].documents if told else None)
                assert not told or told[-1] == Packing(320, corpus.num_bytes)
                assert files(out) == expected
                shutil.rmtree(out)
            else:
                break
        assert stop_after > 10
        assert len(first_told) > 4  # it did go on, rather than begin again


def stop_at(count: int):
    told = iter(range(1, count))

    def listen(_: Packing) -> None:
        if next(told, None) is None:
            raise StoppedError

    return listen


def test_what_another_text_left_behind_is_not_used(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = build_corpus("test", {"code": [f"other {i}" for i in range(300)]})
    with pytest.raises(StoppedError):
        pack(other, tokenizer, tmp_path / "p", shard_tokens=200, listen=stop_at(2))
    assert (tmp_path / ".p.packing" / "journal.jsonl").exists()
    packed = pack(corpus, tokenizer, tmp_path / "p", shard_tokens=100)
    assert packed.names == corpus.names
    pack(corpus, tokenizer, tmp_path / "q", shard_tokens=100)
    assert files(tmp_path / "p") == files(tmp_path / "q")


def test_a_journal_that_was_cut_short_counts_up_to_its_last_line(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pack(corpus, tokenizer, tmp_path / "whole", shard_tokens=300)
    with pytest.raises(StoppedError), pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.data.packing._BATCH_DOCUMENTS", 16)
        pack(corpus, tokenizer, tmp_path / "p", shard_tokens=300, listen=stop_at(15))
    journal = tmp_path / ".p.packing" / "journal.jsonl"
    for size in (len(journal.read_bytes()) - 20, 30, 0):
        journal.write_bytes(journal.read_bytes()[:size])
        work = shutil.copytree(tmp_path / ".p.packing", tmp_path / f".p{size}.packing")
        pack(corpus, tokenizer, tmp_path / f"p{size}", shard_tokens=300)
        assert files(tmp_path / f"p{size}") == files(tmp_path / "whole")
        assert not work.exists()


@pytest.mark.parametrize("line", [0, 1, 3])
def test_a_damaged_journal_starts_the_packing_over(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, line: int
) -> None:
    pack(corpus, tokenizer, tmp_path / "whole", shard_tokens=300)
    with pytest.raises(StoppedError), pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.data.packing._BATCH_DOCUMENTS", 16)
        pack(corpus, tokenizer, tmp_path / "p", shard_tokens=300, listen=stop_at(15))
    journal = tmp_path / ".p.packing" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:line], b"{" + lines[line][1:][::-1] + b"\n", *lines[line + 1 :]]))
    told: list[Packing] = []
    pack(corpus, tokenizer, tmp_path / "p", shard_tokens=300, listen=told.append)
    assert told[0].documents <= 256 and told[-1] == Packing(320, corpus.num_bytes)
    assert files(tmp_path / "p") == files(tmp_path / "whole")


SLOW_SCRIPT = """
import sys, time
from moesaic.data import packing
from moesaic.data.corpus import build_corpus
from moesaic.data.tokenizer import Tokenizer
if __name__ == "__main__":
    packing._WORKER_BYTES, packing._BATCH_DOCUMENTS = 1, 16
    corpus = build_corpus("test", {"a": [f"{i} of {i**3} " * 50 for i in range(20_000)]})
    tokenizer = Tokenizer.train(["of 1 2 3"] * 9, 300)
    print("go", flush=True)
    packing.pack(corpus, tokenizer, sys.argv[1], workers=2, listen=lambda far: print(far.documents, flush=True))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_workers_and_nothing_that_looks_whole(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "script.py").write_text(SLOW_SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "p")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as run:
        assert run.stdout
        for _ in range(3):
            run.stdout.readline()
        os.kill(run.pid, how)
        run.communicate()
    assert not is_packed(tmp_path / "p") and not (tmp_path / "p").exists()
    deadline = time.monotonic() + 20
    while alive(run.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(run.pid)


def alive(group: int) -> list[str]:
    """Processes of a group that have not ended (a zombie has)."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(status.parent.name)
    return found


def test_a_second_process_waits_and_uses_what_the_first_made(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Two threads, since the lock is of the open file and not of the process."""
    started, go = threading.Event(), threading.Event()
    told: list[Packing] = []

    def first(far: Packing) -> None:
        started.set()
        assert go.wait(10)

    def start(listen: Callable[[Packing], None]) -> Future[Packed]:
        return threads.submit(pack, corpus, tokenizer, tmp_path / "p", listen=listen)

    with ThreadPoolExecutor(2) as threads:
        one = start(first)
        assert started.wait(10)
        two = start(told.append)
        time.sleep(0.1)
        assert not two.done()
        go.set()
        assert one.result(10).digest == two.result(10).digest
    assert told == []
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_packing_errors(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shard_tokens=0; use 1 or more"):
        pack(corpus, tokenizer, tmp_path / "p", shard_tokens=0)
    with pytest.raises(DataError, match="no eos token to put between documents"):
        pack(corpus, Tokenizer(tokenizer.backend), tmp_path / "p")
    with pytest.raises(DataError, match="not byte-level BPE"):
        words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        pack(corpus, Tokenizer(words, eos_token="a"), tmp_path / "p")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match="set MOESAIC_CACHE to another folder"):
        pack(corpus, tokenizer, tmp_path / "file" / "cache")
    with pytest.raises(RunFolderError, match="is not an empty folder"):
        pack(corpus, tokenizer, tmp_path / "file")
    with pytest.raises(RunFolderError, match="is not an empty folder"):
        pack(corpus, tokenizer, tmp_path)
    pack(corpus, tokenizer, tmp_path / "p")
    with pytest.raises(RunFolderError, match="holds other packed text; delete it or choose another folder"):
        pack(corpus, Tokenizer(tokenizer.backend, eos_token="<|im_end|>"), tmp_path / "p")


def test_large_vocabularies_are_packed_in_four_bytes(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens([f"<extra {i}>" for i in range(2**16)])
    packed = pack(corpus, Tokenizer(backend, eos_token="<|endoftext|>"), tmp_path / "p")
    assert packed.domains[0].held_out.dtype == np.uint32


def test_a_full_disk_is_one_line(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    refused = pytest.raises(RunFolderError, match=r"cannot write .*/p: File too large; free some space")
    with refused, full_disk(200):
        pack(corpus, tokenizer, tmp_path / "p")
    assert not (tmp_path / "p").exists()
