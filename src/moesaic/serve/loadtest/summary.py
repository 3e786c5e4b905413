"""What a load test found: how much a server did, and what its users waited for."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moesaic.serve.loadtest.asking import Asked

PERCENTILES = (50, 90, 95, 99)


class Spread(NamedTuple):
    """Mean and percentiles of many numbers; NaN where there are none."""

    mean: float
    percentiles: dict[int, float]
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if not values:
            return cls(math.nan, dict.fromkeys(PERCENTILES, math.nan), math.nan)
        found = np.percentile(values, PERCENTILES)
        return cls(
            float(np.mean(values)), dict(zip(PERCENTILES, map(float, found), strict=True)), float(np.max(values))
        )

    def to_dict(self) -> dict[str, float | None]:
        named = {"mean": self.mean, **{f"p{each}": value for each, value in self.percentiles.items()}, "max": self.most}
        return {name: None if math.isnan(value) else round(value, 6) for name, value in named.items()}


class Summary(NamedTuple):
    """Of all requests that ended well, but for errors. seconds: from the first request to the last answer.

    token_speed: tokens a second of one user, after the first token.
    """

    requests: int
    completed: int
    errors: dict[str, int]
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    first_token_s: Spread
    inter_token_s: Spread
    end_to_end_s: Spread
    token_speed: Spread

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def requests_per_s(self) -> float:
        return self.completed / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        own = {name: value.to_dict() if isinstance(value, Spread) else value for name, value in self._asdict().items()}
        return own | {
            "output_tokens_per_s": round(self.output_tokens_per_s, 3),
            "requests_per_s": round(self.requests_per_s, 4),
        }


def summarize(asked: Sequence[Asked]) -> Summary:
    """Figures over everything that was asked."""
    good = [each for each in asked if each.error is None]
    seconds = max((each.ended_s for each in asked), default=0.0) - min((each.started_s for each in asked), default=0.0)
    return Summary(
        requests=len(asked),
        completed=len(good),
        errors=dict(Counter(each.error for each in asked if each.error is not None)),
        seconds=seconds,
        prompt_tokens=sum(each.prompt_tokens for each in good),
        cached_tokens=sum(each.cached_tokens for each in good),
        output_tokens=sum(each.output_tokens for each in good),
        first_token_s=Spread.of([each.first_s - each.started_s for each in good if each.first_s is not None]),
        inter_token_s=Spread.of([gap for each in good for gap in each.gaps_s]),
        end_to_end_s=Spread.of([each.ended_s - each.started_s for each in good]),
        token_speed=Spread.of([speed for each in good if (speed := _speed(each)) is not None]),
    )


def _speed(asked: Asked) -> float | None:
    if asked.first_s is None or asked.output_tokens < 2 or asked.ended_s <= asked.first_s:
        return None
    return (asked.output_tokens - 1) / (asked.ended_s - asked.first_s)
