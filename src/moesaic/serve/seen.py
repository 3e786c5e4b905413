"""What can be seen of a loop from outside: its figures, and its steps as they are made."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A loop's figures; but for the first two lines they only grow.

    queued, running: requests. Tokens of the cache: held by running requests, kept as prefixes beside these, free.
    requests: taken so far; hits: of these, begun with blocks of others, hit_tokens in them; verified: hits that were
    run again without, mismatches of these had other bits. evictions: blocks of prefixes that were let go of.
    preemptions: times that a request lost its place, and went on later. errors: requests that ended with one.
    tokens_run: by the engine, in `steps`; prompt_tokens, new_tokens: of requests; drafted, accepted: drafts.
    engine_s: seconds in the engine; busy_s: seconds in steps, the engine's and all around it.
    """

    queued: int
    running: int
    cache_tokens: int
    held_tokens: int
    kept_tokens: int
    free_tokens: int
    requests: int
    hits: int
    hit_tokens: int
    verified: int
    mismatches: int
    evictions: int
    preemptions: int
    errors: int
    steps: int
    tokens_run: int
    prompt_tokens: int
    new_tokens: int
    drafted: int
    accepted: int
    engine_s: float
    busy_s: float


class RowsSeen(NamedTuple):
    """Which tokens of a step are of a request: `num_tokens` from `first` on, at places `start` and after in its text.

    number: of the request; 0: of none, a prompt that is run again to verify what was shared.
    """

    number: int
    first: int
    num_tokens: int
    start: int


class StepSeen(NamedTuple):
    """A step of the engine, told in the loop's thread while `engine.routed()` is still of this step.

    num_drafts of its tokens are drafts, whether they are accepted or not.
    """

    num_tokens: int
    seconds: float
    rows: tuple[RowsSeen, ...]
    num_drafts: int = 0
