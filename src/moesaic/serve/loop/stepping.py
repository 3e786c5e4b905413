"""The engine's steps as a loop makes them: seen by who listens, and one request's failure kept from the others.

N rows of logits, V vocab, T tokens, M columns of choices.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from moesaic.engine.engine import Engine
from moesaic.errors import GenerationError
from moesaic.serve.loop.turns import Running, Turn
from moesaic.serve.seen import RowsSeen, StepSeen

Listener = Callable[[StepSeen], None]


class Stepped(NamedTuple):
    """The turns that came through, their rows of logits one after another, and what happened to the others."""

    turns: Sequence[Turn]
    logits_NV: np.ndarray
    failed: Sequence[tuple[Turn, GenerationError]]


class Stepping:
    """Runs turns. steps, tokens_run, engine_s: of all steps so far."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps = self.tokens_run = 0
        self.engine_s = 0.0
        self._listeners: tuple[Listener, ...] = ()

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Tell it of every step from now on; what is returned ends that."""
        self._listeners = (*self._listeners, listener)

        def stop() -> None:
            self._listeners = tuple(each for each in self._listeners if each is not listener)

        return stop

    def run(self, turns: Sequence[Turn]) -> Stepped:
        """All together; where that fails one by one, which gives the same bits and shows whose fault it is."""
        try:
            return Stepped(turns, self._step(turns), ())
        except GenerationError:
            return self._one_by_one(turns)

    def _one_by_one(self, turns: Sequence[Turn]) -> Stepped:
        fine, parts, failed = [], [np.empty((0, self.engine.config.vocab_size), np.float32)], []
        for turn in turns:
            try:
                parts.append(self._step([turn]))
                fine.append(turn)
            except GenerationError as error:
                failed.append((turn, error))
        return Stepped(fine, np.concatenate(parts), failed)

    def _step(self, turns: Sequence[Turn]) -> np.ndarray:
        began = time.perf_counter()
        logits_NV = self.engine.step([turn.piece for turn in turns]).numpy()  # which is quicker to cut
        seconds = time.perf_counter() - began
        num_tokens = self.engine.num_routed
        self.steps += 1
        self.tokens_run += num_tokens
        self.engine_s += seconds
        if any(turn.wants_hidden for turn in turns):
            self._read_hidden(turns)
        if self._listeners:
            seen = StepSeen(num_tokens, seconds, _rows(turns), sum(len(turn.drafts) for turn in turns))
            for listener in self._listeners:
                listener(seen)
        if any(turn.wants_experts for turn in turns):
            self._read_experts(turns, num_tokens)
        return logits_NV

    def _read_hidden(self, turns: Sequence[Turn]) -> None:
        """Before anyone who listens has the engine run further."""
        hidden_TD = self.engine.hidden_states()
        for turn, rows in zip(turns, _rows(turns), strict=True):
            if turn.wants_hidden:
                turn.hidden_TD = hidden_TD[rows.first : rows.first + rows.num_tokens]

    def _read_experts(self, turns: Sequence[Turn], num_tokens: int) -> None:
        program, choices = self.engine.program, {}
        for layer, columns in program.routing_columns.items():
            choices[layer] = np.empty((num_tokens, columns), np.int64)
            program.read_choices(layer, choices[layer], np.empty((num_tokens, columns), np.float32))
        for turn, rows in zip(turns, _rows(turns), strict=True):
            if turn.wants_experts:
                turn.experts = {
                    layer: ids_TM[rows.first : rows.first + rows.num_tokens] for layer, ids_TM in choices.items()
                }


def _rows(turns: Sequence[Turn]) -> tuple[RowsSeen, ...]:
    rows, first = [], 0
    for turn in turns:
        count, job = len(turn.piece.token_ids), turn.owner.job
        number = job.number if isinstance(turn.owner, Running) else 0
        rows.append(RowsSeen(number, first, count, job.text.length - count))
        first += count
    return tuple(rows)
