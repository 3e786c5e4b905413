"""Tokenizing in parallel: documents out to worker processes, token ids back in the order they were sent.

The ids do not depend on how many workers there are.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from typing import TypeVar

import tokenizers

from moesaic.data.pieces import Encoded, Encoder
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError

T = TypeVar("T")

_AHEAD = 3  # batches on their way for each worker: enough to keep it busy, few enough to keep in memory


Encode = Callable[[Iterable[tuple[T, Sequence[str]]]], Iterator[tuple[T, Encoded]]]


@contextmanager
def encoder(tokenizer: Tokenizer, workers: int) -> Iterator[Encode]:
    """Yields a function from (tag, documents) pairs to (tag, their ids) pairs, in order, consuming as it goes.

    One worker is this process, with the tokenizer's own threads. More are processes that start afresh ("spawn"), so a
    program that asks for them needs the usual `if __name__ == "__main__"`.
    Raises DataError when a worker dies.
    """
    if workers <= 1:
        here = Encoder(tokenizer)
        yield lambda batches: ((tag, here.encode(texts)) for tag, texts in batches)
        return
    pool = ProcessPoolExecutor(
        max_workers=workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.backend.to_str(), tokenizer.eos_token),
    )
    try:
        yield lambda batches: _in_order(pool, batches, workers * _AHEAD)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that tokenizes ended; unless it said why above, memory may have run out: run it again to go "
            "on, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def refuse_unguarded_main() -> None:
    """Raises DataError in a worker that is about to run its whole program again: it would wait for its parent."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself looks for this
        raise DataError(
            "worker processes read the program that starts them, and this one packs text while it is read; put that "
            'under `if __name__ == "__main__":`, or use workers=1'
        )


def _in_order(
    pool: ProcessPoolExecutor, batches: Iterable[tuple[T, Sequence[str]]], ahead: int
) -> Iterator[tuple[T, Encoded]]:
    waiting: deque = deque()
    for tag, texts in batches:
        waiting.append((tag, pool.submit(_encode_in_worker, texts)))
        if len(waiting) >= ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for tag, future in waiting:
        yield tag, future.result()


_worker: Encoder | None = None  # of a worker process; set once, when it starts


def _start_worker(backend: str, eos_token: str | None) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Encoder(Tokenizer(tokenizers.Tokenizer.from_str(backend), eos_token=eos_token))


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers, and the pool's queue would keep them waiting for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(texts: Sequence[str]) -> Encoded:
    assert _worker is not None
    return _worker.encode(texts)
