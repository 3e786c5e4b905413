"""Drafts only where they are predicted to pay, and at a loss that is bounded where the prediction is wrong.

A draft lengthens the step by the experts that it alone chooses, and saves a step if it is right. Both are predicted:
the one by the model's sizes and the times of steps so far, the other by how many of a text's drafts were right. Each
text has an account: drafts are run only if what they would lose were all of them wrong is within its budget, which is
a small share of its time, and what drafts have gained it. After drafts that lost come steps without, twice as many
each time. What is written is always the same.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moesaic.engine.engine import Engine
from moesaic.serve.choice.writing import Writing
from moesaic.serve.seen import StepSeen
from moesaic.serve.speculation.drafter import Drafter, Wanted
from moesaic.serve.speculation.times import MOST_TOKENS, StepTimes, bytes_touched

MAY_LOSE = 0.01  # of the time of a text
_CREDIT, _LEAST_CREDIT = 1.0, 1 / 16  # tokens' time that may be lost besides, so that a short text can try
_KEPT = 0.95  # weight of older drafts, per draft that was looked at
_MARGIN = 0.05  # of a token's time; predicted gains below are not worth the risk
_DEEPEST = 8  # drafts behind a text
_UNKNOWN = 0.6  # drafts right, and as many wrong, that are taken as seen before any was
_UNSEEN = 0.1, 1.0  # of guesses that can be watched before they are run: they must show themselves first
_FIRST_WAIT, _LONGEST_WAIT = 8, 256  # steps between trials of drafts that are not predicted to pay
_WATCHED = 16  # the last steps of a rest, in which free guesses are made again, to be looked at
_HELD_UP = 3.0  # a step that takes so many times longer than expected was not held up by drafts


def guarded(drafter: Drafter, engine: Engine) -> "Guard":
    """A drafter under a guard, for texts that this engine writes; for one loop."""
    return Guard(drafter, StepTimes(bytes_touched(engine.config, engine.program.packed_bytes)))


@dataclass(eq=False)
class Account:
    """One text: what was drafted for it, and what came of that.

    right, wrong: drafts that were looked at, older ones weigh less. credit: in tokens' time. gained_s: by drafts, below
    0 where they lost; elapsed_s: in all, its share of steps with others. rest: steps that are to be without drafts;
    setback: how many after drafts that lost.
    """

    right: float = _UNKNOWN
    wrong: float = _UNKNOWN
    credit: float = _CREDIT
    gained_s: float = 0.0
    elapsed_s: float = 0.0
    guessed: list[int] = field(default_factory=list)
    place: int = 0
    wait: int = _FIRST_WAIT
    waited: int = _FIRST_WAIT
    rest: int = 0
    setback: int = 0

    @property
    def rate(self) -> float:
        """How likely the next draft is right."""
        return self.right / (self.right + self.wrong)

    def expected(self, depth: int) -> float:
        """Of so many drafts in a row, how many will be right."""
        return sum(self.rate**count for count in range(1, depth + 1))

    def budget_s(self, token_s: float) -> float:
        """What may be lost now."""
        return self.gained_s + MAY_LOSE * self.elapsed_s + self.credit * token_s

    def look_back(self, token_ids: Sequence[int]) -> int:
        """Compare what was guessed with what was written since; how many were right before the first that was not."""
        if not self.guessed:
            return 0
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

    @property
    def is_watched(self) -> bool:
        """Whether a free guess is to be made, and looked at: not where it could not be run for long, as it takes time,
        too."""
        return self.rest <= _WATCHED

    def settle(self, gained_s: float, spent_s: float) -> None:
        """What drafts that were run have gained of steps; what they took is in gained_s already."""
        self.gained_s += gained_s
        if gained_s >= spent_s:
            self.setback //= 2
        else:
            self.setback = min(max(1, 2 * self.setback), _LONGEST_WAIT)
            self.rest = self.setback


@dataclass
class _Run:
    """Drafts that are in the step now: whose, how many, and the time that they took."""

    account: Account
    count: int
    spent_s: float = 0.0


class Guard(Drafter):
    """Asks a drafter, and lets through as many of its drafts as are predicted to pay.

    One that is free guesses for every text that is not in a long rest, so that it is known how well; another only where
    it would be let through, and now and then, as far as the text's account allows. clock: seconds.
    """

    free = True

    def __init__(self, drafter: Drafter, times: StepTimes, clock: Callable[[], float] = time.perf_counter) -> None:
        self.drafter, self.times, self._clock = drafter, times, clock
        self._accounts: dict[Writing, Account] = {}
        self._in_step: list[Account] = []
        self._runs: list[_Run] = []
        self._guess_s = 0.0  # that a guess takes, where it is not free
        self._credit = _CREDIT  # of new texts: less where those before have lost
        self._longest = 0  # drafts of a step so far

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """The drafter's guesses for those texts that gain by them; none for the others."""
        self._settle(wanted)
        if not self.times.known or not wanted:
            return [[] for _ in wanted]
        token_s = self._token_s(len(wanted))
        guesses = self._guesses(wanted, token_s)
        if not any(guesses):
            return guesses
        room = max(1, 2 * self._longest)  # steps of a size that was not seen may take longer than predicted
        num_tokens, drafts = len(wanted), []
        for account, guess in zip(self._in_step, guesses, strict=True):
            count = self._best_count(account, token_s, num_tokens, min(room, len(guess)))
            num_tokens, room = num_tokens + count, room - count
            drafts.append(guess[:count])
        pairs = zip(self._in_step, drafts, strict=True)
        self._runs = [_Run(account, len(kept)) for account, kept in pairs if kept]
        return drafts

    def forget(self, writing: Writing) -> None:
        account = self._accounts.pop(writing, None)
        if account is not None and account.gained_s:
            change = 2.0 if account.gained_s > 0 else 0.5
            self._credit = min(_CREDIT, max(_LEAST_CREDIT, change * self._credit))
        self.drafter.forget(writing)

    def hear(self, seen: StepSeen) -> None:
        """Learn what steps take, and put down to each text what its drafts took of this one."""
        drafted = sum(run.count for run in self._runs) if seen.num_drafts else 0
        expected_s = self.times.predict(seen.num_tokens) if drafted else 0.0
        self.times.observe(seen.num_tokens, seen.seconds)
        if drafted:
            self._longest = max(self._longest, seen.num_drafts)
            took_s = expected_s if seen.num_tokens > MOST_TOKENS else min(seen.seconds, _HELD_UP * expected_s)
            extra_s = took_s - self.times.predict(seen.num_tokens - seen.num_drafts)
            for run in self._runs:
                run.spent_s = extra_s * run.count / drafted
                run.account.gained_s -= run.spent_s
        share_s = seen.seconds / max(1, len(self._in_step))
        for account in self._in_step:
            account.elapsed_s += share_s
        self.drafter.hear(seen)

    def _settle(self, wanted: Sequence[Wanted]) -> None:
        """Look back at what was guessed before this step."""
        runs = {id(run.account): run for run in self._runs}
        token_s = self._token_s(len(self._in_step)) if runs else 0.0
        self._runs, self._in_step = [], []
        for each in wanted:
            account = self._account(each.writing)
            right = account.look_back(each.writing.token_ids)
            account.rest = max(0, account.rest - 1)
            run = runs.get(id(account))
            if run is not None:
                account.settle(min(right, run.count) * token_s, run.spent_s)
            self._in_step.append(account)

    def _account(self, writing: Writing) -> Account:
        account = self._accounts.get(writing)
        if account is None:
            right, wrong = _UNSEEN if self.drafter.free else (_UNKNOWN, _UNKNOWN)
            account = self._accounts[writing] = Account(right, wrong, self._credit)
        return account

    def _token_s(self, num_texts: int) -> float:
        """What a token takes of a step without drafts."""
        return self.times.predict(num_texts) / num_texts

    def _guesses(self, wanted: Sequence[Wanted], token_s: float) -> list[list[int]]:
        """Of all texts, or of those for which a drafter that takes time is worth asking."""
        pairs = list(zip(wanted, self._in_step, strict=True))
        asked = [pair for pair in pairs if self._is_asked(*pair, token_s)]
        for (each, account), guess in zip(asked, self._ask([each for each, _ in asked]), strict=True):
            account.guessed, account.place = guess, len(each.writing.token_ids)
        return [account.guessed for account in self._in_step]

    def _is_asked(self, each: Wanted, account: Account, token_s: float) -> bool:
        return account.is_watched if self.drafter.free else self._worth_asking(each, account, token_s)

    def _worth_asking(self, each: Wanted, account: Account, token_s: float) -> bool:
        """Whether a drafter that takes time is to guess: where it pays, or a trial is due and allowed."""
        num_texts = len(self._in_step)
        if self._best_count(account, token_s, num_texts, min(each.room, _DEEPEST)):
            account.wait = account.waited = _FIRST_WAIT
            return True
        account.waited += 1
        if account.waited < account.wait or account.budget_s(token_s) < self._guess_s * _DEEPEST:
            return False
        account.wait, account.waited = min(2 * account.wait, _LONGEST_WAIT), 0
        return True

    def _ask(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        if not wanted:
            return []
        began = self._clock()
        guesses = self.drafter.propose(wanted)
        took_s = self._clock() - began
        count = sum(map(len, guesses))
        if not self.drafter.free and count:
            self._guess_s = self._guess_s + 0.1 * (took_s / count - self._guess_s) if self._guess_s else took_s / count
            for each, guess in zip(wanted, guesses, strict=True):
                self._accounts[each.writing].gained_s -= took_s * len(guess) / count
        return guesses

    def _best_count(self, account: Account, token_s: float, num_tokens: int, most: int) -> int:
        """How many drafts to run behind a text, in a step that has so many tokens without them; 0: none pay."""
        if account.rest or most < 1:
            return 0
        step_s, budget_s = self.times.predict(num_tokens), account.budget_s(token_s)
        best, best_gain_s, expected = 0, _MARGIN * token_s, 0.0
        for count in range(1, most + 1):
            expected += account.rate**count
            extra_s = max(0.0, self.times.predict(num_tokens + count) - step_s) + self._guess_s * count
            if extra_s > budget_s:
                break
            gain_s = expected * token_s - extra_s
            if gain_s > best_gain_s:
                best, best_gain_s = count, gain_s
        return best
