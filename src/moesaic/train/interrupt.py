"""Ctrl-C in a run: the first one asks it to stop at the next good moment, the second one stops it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop, and has saved where it is; the message says how to go on."""


class StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.is_made = False


@contextmanager
def stop_on_signals(say: Callable[[str], object] | None = None) -> Iterator[StopRequest]:
    """Inside the block the first SIGINT or SIGTERM only makes the request; the next one acts as it did outside.

    Outside the main thread nothing changes, and neither does a signal that is ignored (as under nohup).
    `say` is told, from another thread, that the request was heard.
    """
    request = StopRequest()
    previous: dict[signal.Signals, Any] = {}

    def put_back() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def hear(number: int, frame: object) -> None:
        request.is_made = True
        put_back()
        if say is not None:
            line = "stopping: this step is finished and saved first; once more to stop at once"
            # Not from here: the signal may have come in the middle of a write to the same stream.
            threading.Thread(target=say, args=(line,), daemon=True).start()

    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        previous = {n: handler for n, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
        for number in previous:
            signal.signal(number, hear)
    try:
        yield request
    finally:
        put_back()
