"""Drafts by a smaller model with the same tokens, or by the model's own layers that predict further ones.

Drafts are chosen as the tokens themselves are, by the same rules and random numbers: a model that thinks alike drafts
what will be drawn. N rows, V vocab.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moesaic.data.tokenizer import Tokenizer
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, in_steps
from moesaic.engine.speculative import draft
from moesaic.errors import ConfigError
from moesaic.serve.choice.choosing import Row, chosen_ids
from moesaic.serve.choice.writing import Writing
from moesaic.serve.speculation.drafter import Drafter, Wanted


def check_same_tokens(tokenizer: Tokenizer, of_draft: Tokenizer) -> None:
    """Raise ConfigError where a draft model's tokens have other numbers than the model's."""
    ours, theirs = (each.backend.get_vocab(with_added_tokens=True) for each in (tokenizer, of_draft))
    if ours != theirs:
        apart = sum(theirs.get(token) != token_id for token, token_id in ours.items())
        raise ConfigError(
            f"a draft model with another vocabulary ({apart:,} of {len(ours):,} tokens have another number there); "
            "use one of the same family"
        )


class ModelDrafter(Drafter):
    """Another engine writes `most` tokens ahead. It keeps texts of its own, and takes back what was not accepted.

    vocab_size: of the model that is drafted for; its tokenizer is that of the draft model (`check_same_tokens`).
    """

    def __init__(self, engine: Engine, vocab_size: int, *, most: int = 4) -> None:
        self.engine, self._vocab_size, self._most = engine, vocab_size, most
        self._texts: dict[Writing, _Followed] = {}

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """What the draft model would write, by the rules and random numbers of each text."""
        drafts: list[list[int]] = [[] for _ in wanted]
        rooms = [min(self._most, each.room, self._context_after(each.writing)) for each in wanted]
        texts = [self._texts.setdefault(each.writing, _Followed()) for each in wanted]
        new = [text.follow(self.engine, each.writing.token_ids) for text, each in zip(texts, wanted, strict=True)]
        going = [index for index, room in enumerate(rooms) if room > 0]
        while going:
            logits_NV = self._run([(texts[index], new[index]) for index in going])
            rows = [Row(wanted[index].writing, drafts[index]) for index in going]
            for token, index in zip(chosen_ids(logits_NV.numpy(), rows, self.engine.program), going, strict=True):
                drafts[index].append(token)
                new[index] = [token]
            going = [index for index in going if len(drafts[index]) < rooms[index]]
        return drafts

    def forget(self, writing: Writing) -> None:
        followed = self._texts.pop(writing, None)
        if followed is not None:
            self.engine.free(followed.text)

    def _context_after(self, writing: Writing) -> int:
        """How many tokens the draft model can write behind a text."""
        return self.engine.max_length - len(writing.token_ids) + 1

    def _run(self, new: Sequence[tuple["_Followed", list[int]]]) -> Tensor:
        logits_NV = torch.cat(
            [self.engine.step(pieces) for pieces in in_steps([(each.text, ids) for each, ids in new])]
        )
        for each, ids in new:
            each.token_ids += ids
        missing = self._vocab_size - logits_NV.shape[1]  # embeddings of one family may be padded differently
        return torch.nn.functional.pad(logits_NV, (0, missing), value=-torch.inf) if missing else logits_NV


@dataclass(eq=False)
class _Followed:
    """A draft model's text: what it has run, of which the first `num_sure` tokens are of the text that it follows."""

    text: Text = field(default_factory=Text)
    token_ids: list[int] = field(default_factory=list)
    num_sure: int = 0

    def follow(self, engine: Engine, token_ids: Sequence[int]) -> list[int]:
        """Take back what is otherwise now; what is to be run, at least the newest token."""
        kept, most = self.num_sure, min(len(self.token_ids), len(token_ids) - 1)
        while kept < most and self.token_ids[kept] == token_ids[kept]:
            kept += 1
        kept = min(kept, most)
        engine.cache.cut(self.text, kept)
        del self.token_ids[kept:]
        self.num_sure = len(token_ids)
        return list(token_ids[kept:])


class AheadDrafter(Drafter):
    """The layers that predict further tokens (DeepSeek-V3, arXiv:2412.19437, sec. 2.2) draft one token each.

    engine: the one that is drafted for. Raises ConfigError where it has none.
    """

    def __init__(self, engine: Engine) -> None:
        if not engine.program.num_ahead:
            raise ConfigError("an engine without layers that predict further tokens; make it with mtp=True")
        self.engine = engine

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        def choose(logits_NV: Tensor, drafts: Sequence[Sequence[int]]) -> list[int]:
            rows = [Row(each.writing, drafted) for each, drafted in zip(wanted, drafts, strict=True)]
            return chosen_ids(logits_NV.numpy(), rows, self.engine.program)

        found = draft(self.engine, [(each.text, each.writing.token_ids) for each in wanted], choose)
        return [drafts[: each.room] for drafts, each in zip(found, wanted, strict=True)]
