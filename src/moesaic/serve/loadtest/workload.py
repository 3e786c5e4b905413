"""What a load test asks, and when: the same for the same seed, whichever server it is for."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moesaic.errors import ConfigError
from moesaic.fields import settle

# Log-normal, with the means that the ShareGPT conversations have as vLLM's benchmark samples them (about 217 tokens of
# a prompt, 190 of an answer) and medians of 93 and 115: many are short, a few are long. Cut as that benchmark cuts.
_SHAREGPT_PROMPT = (4.53, 1.30)
_SHAREGPT_OUTPUT = (4.75, 1.00)
_SHORTEST, _LONGEST = 4, 1024

Length = int | Literal["sharegpt"]

_COMMON = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education"
)
WORDS = tuple(_COMMON.split())  # one token each in most vocabularies


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests, and when they are sent.

    rate: a second, at random times (Poisson); else `concurrency` clients that each send the next when they have their
    answer. requests, seconds: how many, how long; at least one of them. prompt_tokens, output_tokens: fixed, or like
    those of ShareGPT. prefix_tokens: that each prompt begins with, the prompt's own come after; of `prefixes` different
    ones, drawn evenly. leave: of the clients, the share that goes away before the answer ends.
    """

    rate: float | None = None
    concurrency: int = 8
    requests: int | None = None
    seconds: float | None = None
    prompt_tokens: Length = "sharegpt"
    output_tokens: Length = "sharegpt"
    prefix_tokens: int = 0
    prefixes: int = 1
    leave: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, "workload")
        if self.requests is None and self.seconds is None:
            raise ConfigError("neither a number of requests nor seconds; say when the load ends")
        for name in ("rate", "concurrency", "requests", "seconds", "prompt_tokens", "output_tokens", "prefixes"):
            value = getattr(self, name)
            if isinstance(value, int | float) and value <= 0:
                raise ConfigError(f"{name}={value}; use more than 0")
        if self.prefix_tokens < 0 or not 0 <= self.leave <= 1:
            raise ConfigError(f"prefix_tokens={self.prefix_tokens}, leave={self.leave}; use 0 or more, and 0 to 1")


class Planned(NamedTuple):
    """A request: when it is sent (seconds after the start; None: when a client is free), and what it asks.

    leaves_after: pieces of its answer after which its client goes away; None: it stays.
    """

    at_s: float | None
    prompt: str
    output_tokens: int
    leaves_after: int | None


def planned(workload: Workload, tokens_per_word: float) -> Iterator[Planned]:
    """The requests in their order, as many as the workload says, or without end."""
    draw = random.Random(workload.seed)
    prefixes = [_words(draw, workload.prefix_tokens, tokens_per_word) for _ in range(workload.prefixes)]
    at_s, number = 0.0, 0
    while workload.requests is None or number < workload.requests:
        number += 1
        if workload.rate is not None:
            at_s += draw.expovariate(workload.rate)
        prefix = draw.choice(prefixes)
        own = _words(draw, _length(draw, workload.prompt_tokens, _SHAREGPT_PROMPT), tokens_per_word)
        output = _length(draw, workload.output_tokens, _SHAREGPT_OUTPUT)
        leaves = draw.random() < workload.leave
        leaves_after = draw.randrange(1, max(2, output // 2)) if leaves else None
        yield Planned(at_s if workload.rate is not None else None, f"{prefix} {own}".strip(), output, leaves_after)


def _length(draw: random.Random, length: Length, sharegpt: tuple[float, float]) -> int:
    if length != "sharegpt":
        return length
    return min(_LONGEST, max(_SHORTEST, round(draw.lognormvariate(*sharegpt))))


def _words(draw: random.Random, num_tokens: int, tokens_per_word: float) -> str:
    """Text of about so many tokens."""
    return " ".join(draw.choices(WORDS, k=max(1, round(num_tokens / tokens_per_word)))) if num_tokens else ""
