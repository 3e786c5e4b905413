"""Drafts only where they are predicted to pay.

A draft lengthens the step by the experts that it alone chooses, and saves a step if it is right. Both are predicted:
the one by the model's sizes and the times of steps so far, the other by how many of a text's drafts were right. An
account of each text holds what wrong predictions lose below a share of its time. What is written is always the same.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from moesaic.engine.engine import Engine
from moesaic.serve.choice.writing import Writing
from moesaic.serve.seen import StepSeen
from moesaic.serve.speculation.drafter import Drafter, Wanted
from moesaic.serve.speculation.times import MOST_TOKENS, StepTimes, bytes_touched

MAY_LOSE = 0.01  # of the time of a text
_CREDIT_STEPS = 1.0  # that may be lost besides, so that a short text can try
_KEPT = 0.95  # weight of older drafts, per draft that was looked at
_MARGIN = 0.05  # of a step; predicted gains below are not worth the risk
_DEEPEST = 8  # drafts behind a text
_UNKNOWN = 0.6  # drafts right, and as many wrong, that are taken as seen before any was
_UNSEEN = 0.1  # right ones, where guesses can be watched before they are run: they must show themselves first
_FIRST_WAIT, _LONGEST_WAIT = 8, 256  # steps between trials of drafts that are not predicted to pay


def guarded(drafter: Drafter, engine: Engine) -> "Guard":
    """A drafter under a guard, for texts that this engine writes; for one loop."""
    return Guard(drafter, StepTimes(bytes_touched(engine.config, engine.program.packed_bytes)))


@dataclass(eq=False)
class Account:
    """One text: what was drafted for it, and what came of that.

    right, wrong: drafts that were looked at, older ones weigh less. gained_s, elapsed_s: by drafts, and in all.
    """

    right: float = _UNKNOWN
    wrong: float = _UNKNOWN
    gained_s: float = 0.0
    elapsed_s: float = 0.0
    guessed: list[int] = field(default_factory=list)
    place: int = 0
    wait: int = _FIRST_WAIT
    waited: int = _FIRST_WAIT

    @property
    def rate(self) -> float:
        """How likely the next draft is right."""
        return self.right / (self.right + self.wrong)

    def expected(self, depth: int) -> float:
        """Of so many drafts in a row, how many will be right."""
        return sum(self.rate**count for count in range(1, depth + 1))

    def may_try(self, step_s: float) -> bool:
        """Whether the account allows a trial that may lose."""
        return self.gained_s > -(MAY_LOSE * self.elapsed_s + _CREDIT_STEPS * step_s)

    def look_back(self, token_ids: Sequence[int]) -> int:
        """Compare what was guessed with what was written since; how many were right before the first that was not."""
        written = token_ids[self.place : self.place + len(self.guessed)]
        right = 0
        for guess, token in zip(self.guessed, written, strict=False):
            self.right, self.wrong = _KEPT * self.right, _KEPT * self.wrong
            if guess != token:
                self.wrong += 1
                break
            self.right += 1
            right += 1
        self.guessed = []
        return right


@dataclass(frozen=True)
class _Run:
    """Drafts that are in the step now: whose, how many, and the time that a token is worth."""

    account: Account
    count: int
    token_s: float


class Guard(Drafter):
    """Asks a drafter, and lets through as many of its drafts as are predicted to pay.

    One that is free guesses for every text, so that it is known how well; another only where it would be let through,
    and now and then, as far as the text's account allows.
    """

    free = True

    def __init__(self, drafter: Drafter, times: StepTimes) -> None:
        self.drafter, self.times = drafter, times
        self._accounts: dict[Writing, Account] = {}
        self._runs: list[_Run] = []
        self._guess_s = 0.0  # that a guess takes, where it is not free
        self._num_texts = 0

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """The drafter's guesses for those texts that gain by them; none for the others."""
        self._settle(wanted)
        if not self.times.known:
            return [[] for _ in wanted]
        self._num_texts = len(wanted)
        asked = [index for index, each in enumerate(wanted) if self.drafter.free or self._worth_asking(each)]
        guesses: list[list[int]] = [[] for _ in wanted]
        for index, guess in zip(asked, self._ask([wanted[index] for index in asked]), strict=True):
            guesses[index] = guess
        num_tokens, drafts = len(wanted), []
        for each, guess in zip(wanted, guesses, strict=True):
            account = self._accounts[each.writing]
            account.guessed, account.place = guess, len(each.writing.token_ids)
            count = self._best_count(account, num_tokens, len(guess))
            num_tokens += count
            drafts.append(guess[:count])
        token_s = self.times.predict(max(1, len(wanted))) / max(1, len(wanted))
        self._runs = [
            _Run(self._accounts[each.writing], len(kept), token_s)
            for each, kept in zip(wanted, drafts, strict=True)
            if kept
        ]
        return drafts

    def forget(self, writing: Writing) -> None:
        self._accounts.pop(writing, None)
        self.drafter.forget(writing)

    def hear(self, seen: StepSeen) -> None:
        """Learn what steps take, and put down to each text what its drafts took of this one."""
        expected_s = self.times.predict(seen.num_tokens)
        self.times.observe(seen.num_tokens, seen.seconds)
        drafted = sum(run.count for run in self._runs)
        if drafted and seen.num_drafts:
            took_s = expected_s if seen.num_tokens > MOST_TOKENS else min(seen.seconds, 2 * expected_s)
            extra_s = took_s - self.times.predict(seen.num_tokens - seen.num_drafts)
            for run in self._runs:
                run.account.gained_s -= extra_s * run.count / drafted
        for account in self._accounts.values():
            account.elapsed_s += seen.seconds
        self.drafter.hear(seen)

    def _settle(self, wanted: Sequence[Wanted]) -> None:
        """Look back at what was guessed before this step."""
        runs = {id(run.account): run for run in self._runs}
        self._runs = []
        for each in wanted:
            account = self._accounts.get(each.writing)
            if account is None:
                account = self._accounts[each.writing] = Account(right=_UNSEEN if self.drafter.free else _UNKNOWN)
            right = account.look_back(each.writing.token_ids)
            run = runs.get(id(account))
            if run is not None:
                account.gained_s += min(right, run.count) * run.token_s

    def _worth_asking(self, each: Wanted) -> bool:
        """Whether a drafter that takes time is to guess: where it pays, or a trial is due and allowed."""
        account = self._accounts[each.writing]
        if self._best_count(account, max(1, self._num_texts), min(each.room, _DEEPEST)):
            account.wait = account.waited = _FIRST_WAIT
            return True
        account.waited += 1
        if account.waited < account.wait or not account.may_try(self.times.predict(max(1, self._num_texts))):
            return False
        account.wait, account.waited = min(2 * account.wait, _LONGEST_WAIT), 0
        return True

    def _ask(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        if not wanted:
            return []
        began = time.perf_counter()
        guesses = self.drafter.propose(wanted)
        took_s = time.perf_counter() - began
        count = sum(map(len, guesses))
        if not self.drafter.free and count:
            self._guess_s = self._guess_s + 0.1 * (took_s / count - self._guess_s) if self._guess_s else took_s / count
            for each, guess in zip(wanted, guesses, strict=True):
                self._accounts[each.writing].gained_s -= took_s * len(guess) / count
        return guesses

    def _best_count(self, account: Account, num_tokens: int, most: int) -> int:
        """How many drafts to run behind a text, in a step that has so many tokens without them; 0: none pay."""
        step_s = self.times.predict(num_tokens)
        if not account.may_try(step_s):
            return 0
        token_s = self.times.predict(self._num_texts) / self._num_texts if self._num_texts else step_s
        best, best_gain_s = 0, _MARGIN * token_s
        for count in range(1, most + 1):
            extra_s = max(0.0, self.times.predict(num_tokens + count) - step_s) + self._guess_s * count
            gain_s = account.expected(count) * token_s - extra_s
            if gain_s > best_gain_s:
                best, best_gain_s = count, gain_s
        return best
