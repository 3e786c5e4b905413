"""Greedy writing in which the layers that predict further tokens draft, and one step of the model looks at all drafts.

What it would have written itself is accepted (arXiv:1811.03115, sec. 3; with these layers: DeepSeek-V3,
arXiv:2412.19437, sec. 5.4.3). As a token gets the same bits however it runs, what is written is what the model writes
alone, token for token.

N rows of logits, V vocab.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import eq
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece, in_steps
from moesaic.engine.generate import check_prompts
from moesaic.engine.sampling import likeliest
from moesaic.errors import ConfigError, GenerationError


class Speculated(NamedTuple):
    """The new tokens of each prompt; how many tokens were drafted on the way, and how many of these were accepted."""

    token_ids: list[list[int]]
    drafted: int
    accepted: int


def generate_batch(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    *,
    eos_token_ids: Iterable[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Speculated:
    """What `engine.generate_batch` writes at temperature 0, in fewer steps where drafts are right.

    Raises ConfigError for an engine without the layers that draft.
    """
    if not engine.program.num_ahead:
        raise ConfigError("an engine without layers that predict further tokens; make it with mtp=True")
    check_prompts(engine.config, [list(prompt) for prompt in prompts], max_new_tokens, engine.max_length)
    stops = frozenset(engine.config.eos_token_ids if eos_token_ids is None else eos_token_ids)
    texts = [
        _Written(Text(), list(prompt), len(prompt), min(len(prompt) + max_new_tokens, engine.max_length), stops)
        for prompt in prompts
    ]
    try:
        drafted, accepted = _write(engine, texts, on_token)
    finally:
        for each in texts:
            engine.free(each.text)
    return Speculated([each.token_ids[each.num_prompt :] for each in texts], drafted, accepted)


Choose = Callable[[Tensor, Sequence[Sequence[int]]], Sequence[int]]
"""The tokens for rows of logits [N, V], given the drafts of each text so far."""


def _likeliest(logits_NV: Tensor, drafts: Sequence[Sequence[int]]) -> Sequence[int]:
    return likeliest(logits_NV).tolist()


def draft(engine: Engine, texts: Sequence[tuple[Text, Sequence[int]]], choose: Choose = _likeliest) -> list[list[int]]:
    """What may follow the newest token of each text, by each layer that predicts further tokens, in turn.

    texts: each with all of its tokens, of which the engine has run all but the newest. The layers first run at all
    places where they have not yet. choose: a layer's drafts from its logits; else the likeliest. Raises GenerationError
    for a text with other tokens than that.
    """
    for text, token_ids in texts:
        if not 0 < text.length == len(token_ids) - 1:
            raise GenerationError(
                f"a text of {len(token_ids)} tokens of which {text.length} were run; run all but the newest"
            )
    drafts: list[list[int]] = [[] for _ in texts]
    num_layers = engine.program.num_ahead if texts else 0
    try:
        for depth in range(1, num_layers + 1):
            new = [
                (text, _from(text.ahead.get(depth, 0) + depth, token_ids, drafted))
                for (text, token_ids), drafted in zip(texts, drafts, strict=True)
            ]
            logits_NV = torch.cat([engine.ahead(pieces, depth) for pieces in in_steps(new)])
            for drafted, token in zip(drafts, choose(logits_NV, drafts), strict=True):
                drafted.append(token)
    finally:
        for text, _ in texts:
            text.forget_ahead()
    return drafts


def agreed(drafted: Sequence[int], logits_NV: Tensor) -> list[int]:
    """What the model writes: the drafts up to the first that it would not have written, and then its own.

    logits_NV: of the token before the drafts, and of each of these.
    """
    own = likeliest(logits_NV).tolist()
    right = next((place for place, token in enumerate(drafted) if token != own[place]), len(drafted))
    return own[: right + 1]


@dataclass(eq=False)
class _Written:
    """A text and all its tokens: at most `most`, and none after one of `stops` that is not of the prompt."""

    text: Text
    token_ids: list[int]
    num_prompt: int
    most: int
    stops: frozenset[int]

    @property
    def room(self) -> int:
        """For new tokens."""
        ended = len(self.token_ids) > self.num_prompt and self.token_ids[-1] in self.stops
        return 0 if ended else self.most - len(self.token_ids)

    def add(self, token_ids: Iterable[int]) -> list[int]:
        """Those that there is room for."""
        before = len(self.token_ids)
        for token in token_ids:
            if self.room:
                self.token_ids.append(token)
        return self.token_ids[before:]


def _write(engine: Engine, texts: list[_Written], on_token: Callable[[int, int], None] | None) -> tuple[int, int]:
    """Write on all of them; how many tokens were drafted and accepted."""
    num_drafted = num_accepted = 0
    running = [(index, each) for index, each in enumerate(texts) if each.room]
    drafts: list[list[int]] = [[] for _ in running]
    parts = _first_logits(engine, [each for _, each in running])
    while running:
        for (index, each), drafted, logits_NV in zip(running, drafts, parts, strict=True):
            new = each.add(agreed(drafted, logits_NV))
            engine.cache.cut(each.text, len(each.token_ids) - 1)
            num_drafted += len(drafted)
            num_accepted += sum(map(eq, drafted, new))
            if on_token:
                for token in new:
                    on_token(index, token)
        running = [(index, each) for index, each in running if each.room]
        if running:
            drafts, parts = _next_logits(engine, [each for _, each in running])
    return num_drafted, num_accepted


def _first_logits(engine: Engine, texts: list[_Written]) -> Sequence[Tensor]:
    """Of each text's last token, [1, V]."""
    steps = in_steps([(each.text, each.token_ids) for each in texts])
    return [logits_V[None] for pieces in steps for logits_V in engine.step(pieces)]


def _next_logits(engine: Engine, texts: list[_Written]) -> tuple[list[list[int]], Sequence[Tensor]]:
    """Drafts for each text, and the logits of its newest token and of these."""
    drafts = draft(engine, [(each.text, each.token_ids) for each in texts])
    drafts = [drafted[: each.room - 1] for each, drafted in zip(texts, drafts, strict=True)]
    pieces = [
        Piece(each.text, [each.token_ids[-1], *drafted], "all") for each, drafted in zip(texts, drafts, strict=True)
    ]
    return drafts, engine.step(pieces).split([len(piece.token_ids) for piece in pieces])


def _from(place: int, token_ids: Sequence[int], drafted: list[int]) -> list[int]:
    """The tokens of a text and its drafts, from one on."""
    return [*token_ids[place:], *drafted[max(0, place - len(token_ids)) :]]
