"""The loop: a thread that takes requests, runs the engine step by step, and tells what came of each.

N rows of logits, V vocab.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Sequence

from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.errors import GenerationError
from moesaic.serve.choosing import Row, choose
from moesaic.serve.request import Event, Finished, Heard, Request
from moesaic.serve.writing import Writing

STEP_TOKENS = 256


class _Running:
    """A request in the engine."""

    def __init__(self, number: int, writing: Writing) -> None:
        self.number, self.writing, self.text = number, writing, Text()

    def piece(self, room: int) -> Piece:
        """Its next tokens."""
        left = self.writing.token_ids[self.text.length :]
        return Piece(self.text, left[:room], "last" if len(left) <= room else "none")


class Loop:
    """Runs requests through an engine, many together. Thread-safe but for what its own thread does.

    hear: told, in the loop's thread, everything that came of a step at once. decode: token ids to text.
    """

    def __init__(
        self,
        engine: Engine,
        decode: Callable[[list[int]], str],
        hear: Callable[[Sequence[Heard]], None],
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self.engine, self.decode, self.hear, self.on_step = engine, decode, hear, on_step
        self._numbers = itertools.count(1)
        self._inbox: queue.SimpleQueue[tuple[int, Request | None] | None] = queue.SimpleQueue()
        self._running: dict[int, _Running] = {}
        self._thread = threading.Thread(target=self._run, name="engine loop", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> int:
        """Take a request; its number. Raises GenerationError for one that this engine cannot run."""
        if len(request.prompt_ids) >= self.engine.max_length:
            raise GenerationError(
                f"a prompt of {len(request.prompt_ids)} tokens leaves no room in a context of "
                f"{self.engine.max_length}; shorten it to {self.engine.max_length - 1} tokens or fewer"
            )
        number = next(self._numbers)
        self._inbox.put((number, request))
        return number

    def cancel(self, number: int) -> None:
        """End a request as it stands; it hears so. One that has ended already hears nothing."""
        self._inbox.put((number, None))

    def close(self) -> None:
        """End all requests, and the thread."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._take():
            self._step()

    def _take(self) -> bool:
        """What has come in; waits for something when there is nothing to do. False: to be closed."""
        while not self._running or not self._inbox.empty():
            got = self._inbox.get()
            if got is None:
                self._end(list(self._running), "cancelled")
                return False
            number, request = got
            if request is None:
                self._end([number], "cancelled")
            else:
                self._running[number] = _Running(number, Writing(request, self.decode, self.engine.max_length))
        return True

    def _end(self, numbers: Sequence[int], reason: str) -> None:
        ended = [self._running.pop(number) for number in numbers if number in self._running]
        for each in ended:
            self.engine.free(each.text)
        self.hear([Heard(each.number, Finished("cancelled", each.writing.usage())) for each in ended])

    def _step(self) -> None:
        room, pieces, wanted = STEP_TOKENS, [], []
        for each in self._running.values():
            if room <= 0:
                break
            piece = each.piece(room)
            room -= len(piece.token_ids)
            pieces.append(piece)
            if piece.wants == "last":
                wanted.append(each)
        logits_NV = self.engine.step(pieces)
        if self.on_step is not None:
            self.on_step()
        chosen = choose(logits_NV, [Row(each.writing) for each in wanted])
        heard: list[Heard] = []
        for each, info in zip(wanted, chosen, strict=True):
            events: list[Event] = [each.writing.add([info])]
            if each.writing.ended:
                events.append(each.writing.finished())
                del self._running[each.number]
                self.engine.free(each.text)
            heard += [Heard(each.number, event) for event in events]
        self.hear(heard)
