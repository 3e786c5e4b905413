"""What a step runs of each request, and what is to come of its rows of logits.

N rows, V vocab, M columns of choices, T tokens, D hidden size.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import eq

import numpy as np
from torch import Tensor

from moesaic.engine.engine import Piece
from moesaic.serve.choice.choosing import Row
from moesaic.serve.choice.pooling import PromptPooling
from moesaic.serve.choice.prompt_scores import PromptScores
from moesaic.serve.choice.writing import Writing
from moesaic.serve.request import TokenInfo
from moesaic.serve.schedule.waiting import Job

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Running:
    """A request and how far it is. scores, pooling: of its prompt, where asked for and not yet told."""

    job: Job
    writing: Writing
    scores: PromptScores | None = None
    pooling: PromptPooling | None = None

    @property
    def told(self) -> bool:
        """Whether nothing is owed of its prompt."""
        return self.scores is None and self.pooling is None


@dataclass(eq=False)
class Check:
    """A prompt that began with blocks of others, to be run again without. wanted_V: the logits that followed it."""

    job: Job
    wanted_V: np.ndarray

    def agrees(self, found_V: np.ndarray) -> bool:
        """Whether the bits are the same; logs where they are not."""
        if np.array_equal(self.wanted_V, found_V):
            return True
        _log.error(
            "a prompt of %d tokens has other logits when it shares nothing, up to %g apart; set share_prefixes=False",
            len(self.job.token_ids),
            float(np.abs(self.wanted_V - found_V).max()),
        )
        return False


@dataclass(eq=False)
class Turn:
    """The next tokens of a request in a step, drafts behind them.

    experts: by layer, those that its tokens went to, [tokens, M], where asked for. hidden_TD: of its tokens, where a
    vector is to come of them.
    """

    owner: Running | Check
    piece: Piece
    drafts: list[int] = field(default_factory=list)
    experts: dict[int, np.ndarray] | None = None
    hidden_TD: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Of logits."""
        wants = self.piece.wants
        return 0 if wants == "none" else 1 if wants == "last" else len(self.piece.token_ids)

    @property
    def start(self) -> int:
        """The place of its first token in its text, once it has run."""
        return self.owner.job.text.length - len(self.piece.token_ids)

    @property
    def wants_experts(self) -> bool:
        return isinstance(self.owner, Running) and self.owner.writing.request.experts

    @property
    def wants_hidden(self) -> bool:
        return isinstance(self.owner, Running) and self.owner.pooling is not None

    def choices(self) -> list[Row]:
        """Once it has run, the tokens to be chosen: the one that follows its own, and one behind each draft."""
        owner = self.owner
        if isinstance(owner, Check) or owner.job.left > 0 or owner.writing.ended:
            return []
        return [Row(owner.writing, self.drafts[:count]) for count in range(len(self.drafts) + 1)]

    def agreed(self, chosen: Sequence[TokenInfo]) -> list[TokenInfo]:
        """The drafts up to the first that would not have been chosen, and then what is chosen there."""
        wrong = (place for place, draft in enumerate(self.drafts) if chosen[place].token_id != draft)
        return list(chosen[: next(wrong, len(self.drafts)) + 1])

    def num_accepted(self, taken: Sequence[TokenInfo]) -> int:
        """Of the drafts, those among the tokens that were taken."""
        return sum(map(eq, self.drafts, (info.token_id for info in taken)))

    def experts_of(self, count: int) -> dict[int, np.ndarray] | None:
        """Those that made the first `count` of the tokens that were chosen."""
        if self.experts is None:
            return None
        first = len(self.piece.token_ids) - len(self.drafts) - 1
        return {layer: ids_TM[first : first + count] for layer, ids_TM in self.experts.items()}


def turn_of(owner: Running | Check, num_tokens: int) -> Turn:
    """The next tokens of a request; logits of all of them where its prompt is scored."""
    job = owner.job
    start, end = job.text.length, job.text.length + num_tokens
    scored = isinstance(owner, Running) and owner.scores is not None
    wants = "all" if scored else "last" if end == len(job.token_ids) else "none"
    return Turn(owner, Piece(job.text, job.token_ids[start:end], wants))


def add_drafts(turn: Turn, drafts: list[int]) -> None:
    """Run these behind its newest token."""
    turn.drafts = drafts
    turn.piece = Piece(turn.piece.text, [*turn.piece.token_ids, *drafts], "all")
