"""Runs requests through an engine, step by step: what is to run, what came of it, and who has ended.

N rows of logits, V vocab.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from moesaic.engine.cache import BLOCK_TOKENS
from moesaic.engine.engine import Engine
from moesaic.errors import GenerationError
from moesaic.serve.choice.choosing import Row, choose
from moesaic.serve.choice.guidance import Guidance, Guide
from moesaic.serve.choice.pooling import PromptPooling
from moesaic.serve.choice.prompt_scores import PromptScores, rows_at_once
from moesaic.serve.choice.rules import check_rules
from moesaic.serve.choice.writing import Writing
from moesaic.serve.loop.settings import LoopSettings
from moesaic.serve.loop.stepping import Stepping
from moesaic.serve.loop.turns import Check, Running, Turn, add_drafts, turn_of
from moesaic.serve.request import Event, Finished, Heard, Progress, Request, TokenInfo
from moesaic.serve.schedule.prefix_cache import PrefixCache
from moesaic.serve.schedule.scheduler import Scheduler
from moesaic.serve.schedule.waiting import Job
from moesaic.serve.speculation.drafter import Drafter, Wanted

_log = logging.getLogger(__name__)

_CACHE_TOKENS = 65_536
_AFTER_ALL = 2**62  # the priority of what only verifies

Ending = Literal["cancelled", "timeout", "error"]


class Runner:
    """Requests by their numbers, in an engine that nobody else uses meanwhile. All of it for one thread.

    max_length: the most tokens of a text, that of the engine or of its cache. running: what has not ended, waiting or
    not. counts: what has been, by name.
    """

    def __init__(
        self,
        engine: Engine,
        decode: Callable[[list[int]], str],
        settings: LoopSettings | None = None,
        drafter: Drafter | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        self.engine, self.decode, self.drafter, self.guidance = engine, decode, drafter, guidance
        self.settings = settings or LoopSettings()
        self.max_length = min(engine.max_length, self._reserve())
        self.scheduler = Scheduler(
            PrefixCache(engine.cache),
            step_tokens=self.settings.step_tokens,
            max_running=self.settings.max_running,
            scored_tokens=rows_at_once(engine.config.vocab_size),
        )
        self.stepping = Stepping(engine)
        if drafter is not None:
            self.stepping.listen(drafter.hear)
        self.running: dict[int, Running] = {}
        self.counts: Counter[str] = Counter()
        self._checks: dict[int, Check] = {}
        self._shares = self.settings.share_prefixes and can_share(engine)
        self._to_verify = 0.0
        self._heard: list[Heard] = []

    @property
    def busy(self) -> bool:
        """Whether there is anything to step for."""
        return bool(self.running or self._checks)

    def writing(self, request: Request) -> Writing:
        """What is to be added of a request; from any thread. Raises GenerationError for one that can never run here."""
        self._check(request)
        return Writing(request, self.decode, self.max_length, self._guide(request))

    def add(self, number: int, writing: Writing) -> None:
        """Take a request. Numbers are above 0 and grow."""
        request = writing.request
        count = request.prompt_logprobs
        scores = None if count is None else PromptScores(request.prompt_ids, count)
        pooling = None if request.pooling is None else PromptPooling(len(request.prompt_ids), request.pooling)
        # What would follow a prompt is of no interest where nothing is to be written.
        token_ids = list(request.prompt_ids[:-1]) if writing.ended and pooling is None else writing.token_ids
        job = Job(
            number,
            token_ids,
            request.priority,
            request.client,
            shares=self._shares and scores is None and request.pooling != "mean",
            scored=scores is not None,
        )
        running = self.running[number] = Running(job, writing, scores, pooling)
        self.counts["requests"] += 1
        self.counts["prompt_tokens"] += len(request.prompt_ids)
        self.scheduler.add(job)
        if writing.ended and (scores is None or scores.complete) and pooling is None:
            self._finish(running)

    def end(self, number: int, reason: Ending, error: str | None = None) -> None:
        """End a request as it stands, if it has not ended; what of its text was held back is told."""
        running = self.running.get(number)
        if running is None:
            return
        text = running.writing.give_up()
        if text:
            self._heard.append(Heard(number, Progress((), text)))
        self.counts[reason] += 1
        self._forget(running, Finished(reason, running.writing.usage(), error=error))

    def end_waiting(self) -> None:
        """Cancel what has not begun."""
        for number in [number for number, running in self.running.items() if running.job.cached is None]:
            self.end(number, "cancelled")

    def end_all(self, reason: Ending, error: str | None = None) -> None:
        """End everything, and forget all prefixes."""
        for number in list(self.running):
            self.end(number, reason, error)
        for check in list(self._checks.values()):
            self._drop(check)
        self.scheduler.prefixes.clear()

    def step(self) -> None:
        """Run the engine once for all whose turn it is."""
        turns = [turn_of(self._owner(job), num_tokens) for job, num_tokens in self.scheduler.plan()]
        if not turns:
            raise RuntimeError("requests wait, and none can run")
        if self.drafter is not None:
            self._draft(turns, self.drafter)
        if self.guidance is not None:
            self.guidance.look_ahead(list(_guided(turns)))
        turns, logits_NV, failed = self.stepping.run(turns)
        for turn, error in failed:
            self._fail(turn, error)
        rows = _split(turns, logits_NV)
        chosen = self._choose(turns, rows, logits_NV)
        for turn, rows_NV, infos in zip(turns, rows, chosen, strict=True):
            if isinstance(turn.owner, Check):
                self._settle_check(turn.owner, rows_NV)
            elif infos is not None:
                self._settle(turn.owner, turn, rows_NV, infos)

    def take_heard(self) -> list[Heard]:
        """What came of everything since the last time."""
        heard, self._heard = self._heard, []
        return heard

    def _check(self, request: Request) -> None:
        prompt, vocab = request.prompt_ids, self.engine.config.vocab_size
        most = self.max_length - (request.max_new_tokens > 0)
        if len(prompt) > most:
            raise GenerationError(
                f"a prompt of {len(prompt)} tokens leaves no room in a context of {self.max_length}; "
                f"shorten it to {most} tokens or fewer"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise GenerationError(f"token ids {min(prompt)} to {max(prompt)}; the model knows 0 to {vocab - 1}")
        check_rules(request, vocab)

    def _reserve(self) -> int:
        """Take the room of the cache at once: one that grows is copied each time. How many tokens it holds."""
        limit = self.engine.cache.max_blocks
        self.engine.reserve(self.settings.cache_tokens or (_CACHE_TOKENS if limit is None else limit * BLOCK_TOKENS))
        return self.engine.cache.num_blocks * BLOCK_TOKENS

    def _owner(self, job: Job) -> Running | Check:
        return self.running.get(job.number) or self._checks[job.number]

    def _guide(self, request: Request) -> Guide | None:
        if request.grammar is None:
            return None
        if self.guidance is None:
            raise GenerationError("a schema, expression or grammar for a server without guidance; leave it out")
        return self.guidance.guide(request)

    def _draft(self, turns: Sequence[Turn], drafter: Drafter) -> None:
        """Have drafts run behind newest tokens, as many as there is room for."""
        spare = self.scheduler.spare_tokens
        takers = [(turn, writing, room) for turn in turns for writing, room in _draft_room(turn, spare)]
        try:
            proposed = drafter.propose([Wanted(writing, turn.piece.text, room) for turn, writing, room in takers])
        except GenerationError:
            _log.exception("the drafter failed; this step has no drafts")
            return
        for (turn, writing, room), drafts in zip(takers, proposed, strict=True):
            if not drafts:
                continue
            drafts = drafts[: min(room, self.scheduler.spare_tokens)]
            if writing.guide is not None:
                drafts = drafts[: writing.guide.num_valid(drafts)]
            if drafts and self.scheduler.add_drafts(turn.owner.job, len(drafts)):
                add_drafts(turn, drafts)

    def _choose(
        self, turns: Sequence[Turn], rows: Sequence[np.ndarray], logits_NV: np.ndarray
    ) -> list[list[TokenInfo] | None]:
        """The tokens of each turn; None for one that none can be chosen for, which is ended."""
        choices = [turn.choices() for turn in turns]
        wanted = [row for of_turn in choices for row in of_turn]
        if len(wanted) < len(logits_NV):
            parts = [rows_NV[-len(of_turn) :] for rows_NV, of_turn in zip(rows, choices, strict=True) if of_turn]
            logits_NV = np.concatenate(parts) if parts else logits_NV[:0]
        try:
            infos = iter(choose(logits_NV, wanted, self.engine.program) if wanted else ())
        except GenerationError:
            return [self._choose_alone(*each) for each in zip(turns, rows, choices, strict=True)]
        return [list(itertools.islice(infos, len(of_turn))) for of_turn in choices]

    def _choose_alone(self, turn: Turn, rows_NV: np.ndarray, choices: list[Row]) -> list[TokenInfo] | None:
        try:
            return choose(rows_NV[-len(choices) :], choices, self.engine.program) if choices else []
        except GenerationError as error:
            self._fail(turn, error)
            return None

    def _settle(self, running: Running, turn: Turn, rows_NV: np.ndarray, chosen: Sequence[TokenInfo]) -> None:
        """Take what came of a turn."""
        if running.scores is not None:
            self._score(running, running.scores, turn, rows_NV)
        if running.pooling is not None and turn.hidden_TD is not None:
            try:
                self._pool(running, running.pooling, turn, turn.hidden_TD)
            except GenerationError as error:
                self._fail(turn, error)
                return
        if chosen:
            self._write(running, turn, rows_NV, chosen)
        self.scheduler.ran(running.job)
        if running.writing.ended and running.told:
            self._finish(running)

    def _score(self, running: Running, scores: PromptScores, turn: Turn, rows_NV: np.ndarray) -> None:
        scores.add(turn.start, rows_NV, self.engine.program)
        if scores.complete:
            self._heard.append(Heard(running.job.number, scores.event()))
            running.scores, running.job.scored = None, False

    def _pool(self, running: Running, pooling: PromptPooling, turn: Turn, hidden_TD: Tensor) -> None:
        pooling.add(turn.start, hidden_TD)
        if pooling.complete:
            self._heard.append(Heard(running.job.number, pooling.event()))
            running.pooling = None

    def _write(self, running: Running, turn: Turn, rows_NV: np.ndarray, chosen: Sequence[TokenInfo]) -> None:
        writing, job = running.writing, running.job
        if not writing.num_new:
            writing.cached_tokens = job.cached or 0
            if writing.cached_tokens:
                self._verify(running, rows_NV[-1])
        progress = writing.add(turn.agreed(chosen))
        if turn.drafts:
            accepted = turn.num_accepted(progress.tokens)
            writing.drafted += len(turn.drafts)
            writing.accepted += accepted
            self.counts["drafted"] += len(turn.drafts)
            self.counts["accepted"] += accepted
            self.engine.cache.cut(job.text, len(writing.token_ids) - 1)
        self.counts["new_tokens"] += len(progress.tokens)
        if turn.experts is not None:
            progress = progress._replace(experts=turn.experts_of(len(progress.tokens)))
        self._heard.append(Heard(job.number, progress))

    def _verify(self, running: Running, logits_V: np.ndarray) -> None:
        """Have a prompt run again without what it shared, now and then."""
        self._to_verify += self.settings.verify_hits
        if self._to_verify >= 1:
            self._to_verify -= 1
            number = -running.job.number
            job = Job(number, list(running.writing.request.prompt_ids), _AFTER_ALL, shares=False)
            self._checks[number] = Check(job, logits_V.copy())
            self.scheduler.add(job)

    def _settle_check(self, check: Check, rows_NV: np.ndarray) -> None:
        if not check.job.left:
            self.counts["verified"] += 1
            self.counts["mismatches"] += not check.agrees(rows_NV[-1])
            self._drop(check)

    def _fail(self, turn: Turn, error: GenerationError) -> None:
        if isinstance(turn.owner, Check):
            self._drop(turn.owner)
        else:
            self.end(turn.owner.job.number, "error", str(error))

    def _drop(self, check: Check) -> None:
        del self._checks[check.job.number]
        self.scheduler.end(check.job)

    def _finish(self, running: Running) -> None:
        if running.scores is not None:
            self._heard.append(Heard(running.job.number, running.scores.event()))
        self._forget(running, running.writing.finished())

    def _forget(self, running: Running, last: Event) -> None:
        del self.running[running.job.number]
        self.scheduler.end(running.job)
        if self.drafter is not None:
            self.drafter.forget(running.writing)
        self._heard.append(Heard(running.job.number, last))


def can_share(engine: Engine) -> bool:
    """Whether texts may share blocks. Layers that predict further tokens keep what depends on the ones that follow."""
    return not engine.program.num_ahead and all(state.can_share_prefix for state in engine.config.states())


def _draft_room(turn: Turn, spare: int) -> Iterator[tuple[Writing, int]]:
    """Whose newest token is run, and how many drafts at the most; nothing where there may be none."""
    owner = turn.owner
    if isinstance(owner, Running) and turn.piece.wants == "last" and len(turn.piece.token_ids) == 1:
        writing = owner.writing
        room = min(writing.most - len(writing.token_ids) - 1, spare)
        if room > 0 and writing.request.speculate:
            yield writing, room


def _guided(turns: Sequence[Turn]) -> Iterator[tuple[Guide, Sequence[int]]]:
    """Those whose next tokens will be chosen by a grammar, and their drafts."""
    for turn in turns:
        if isinstance(turn.owner, Running) and turn.owner.writing.guide is not None:
            job = turn.owner.job
            if job.left == len(turn.piece.token_ids) - len(turn.drafts):
                yield turn.owner.writing.guide, turn.drafts


def _split(turns: Sequence[Turn], logits_NV: np.ndarray) -> Sequence[np.ndarray]:
    """The rows of each turn."""
    ends = list(itertools.accumulate(turn.num_rows for turn in turns))
    return [logits_NV[end - turn.num_rows : end] for turn, end in zip(turns, ends, strict=True)]
