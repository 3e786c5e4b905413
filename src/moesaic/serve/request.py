"""What a client asks of a model, and what it hears back: the seam between the protocols and the loop.

Token ids in, token ids and text out; nothing here knows HTTP.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from moesaic.engine.sampling import Sampling
from moesaic.errors import GenerationError

MAX_TOP_LOGPROBS = 20
GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]
PoolingKind = Literal["mean", "last"]


class Grammar(NamedTuple):
    """What the text must be: text is the schema (JSON), the expression or the grammar, empty for "json_object"."""

    kind: GrammarKind
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One continuation of one prompt.

    eos_token_ids: end it and are not part of its text. stop: so do these texts (kept in it with include_stop).
    top_logprobs: None: no log probabilities; N: of the chosen token and of the N likeliest. prompt_logprobs: the same
    of the prompt's tokens. pooling: no text but a vector of the prompt, the mean of its tokens' hidden states or that
    of the last; for max_new_tokens=0. priority: smaller goes first. speculate: may drafts be used. experts: tell which
    experts its tokens went to. timeout_s: after which it ends as it stands. client: whose it is; those of one priority
    take turns.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eos_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    min_new_tokens: int = 0
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    pooling: PoolingKind | None = None
    grammar: Grammar | None = None
    priority: int = 0
    speculate: bool = True
    experts: bool = False
    timeout_s: float | None = None
    client: str = ""

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise GenerationError("an empty prompt; give at least one token (the model's bos token, for example)")
        if self.max_new_tokens < 0:
            raise GenerationError(f"max_new_tokens={self.max_new_tokens}; use 0 or more")
        for name in ("top_logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_TOP_LOGPROBS:
                raise GenerationError(f"{name}={value}; use 0 to {MAX_TOP_LOGPROBS}")
        if self.pooling is not None and (self.max_new_tokens or self.prompt_logprobs is not None):
            raise GenerationError("pooling with a text or log probabilities; use max_new_tokens=0, and ask for one")
        if "" in self.stop:
            raise GenerationError("an empty stop text; leave it out")


class TokenInfo(NamedTuple):
    """A token, its log probability (None: not asked for, or a prompt's first) and the likeliest ones in its place."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class PromptScored(NamedTuple):
    """The tokens of the prompt with their log probabilities."""

    tokens: tuple[TokenInfo, ...]


class Pooled(NamedTuple):
    """A vector of the whole prompt, fp32 [D], of length 1."""

    vector_D: np.ndarray


class Progress(NamedTuple):
    """New tokens of a request, and the text that is now certain; some is held back, for a character or a stop text.

    experts: by layer, those that each of these tokens was made by, [tokens, M], -1 where there is none.
    """

    tokens: tuple[TokenInfo, ...]
    text: str
    experts: dict[int, np.ndarray] | None = None


class Usage(NamedTuple):
    """cached_tokens: of the prompt, those that another request had left in the cache. drafted, accepted: tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0


class Finished(NamedTuple):
    """The last event of a request.

    reason: "stop": an end token or a stop text (`stop` says which); "length": max_new_tokens or the context was
    reached; "cancelled", "timeout"; "error": `error` says what happened.
    """

    reason: Literal["stop", "length", "cancelled", "timeout", "error"]
    usage: Usage
    stop: str | int | None = None
    error: str | None = None


Event = PromptScored | Pooled | Progress | Finished


class Heard(NamedTuple):
    """An event, and the number of the request that it is of."""

    number: int
    event: Event
