"""What a step of the engine takes, by how many tokens it runs: predicted by what it reads, learned from what is seen.

m tokens of a step.
"""

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np

from moesaic.config import ModelConfig, MoeConfig
from moesaic.plan.routing import distinct_experts

MOST_TOKENS = 64  # steps with more are mostly prompts, which say little about a few drafts
_ROW_SHARE = 0.2  # until steps of several sizes were seen: a token's own work, of the time that one alone takes
_NEW = 0.1  # weight of a step's time among those of its size
_FIRST = 0.5  # and of the first of its size, against the formula
_ASSUMED = 0.05  # weight of _ROW_SHARE against a size that was seen
_LONGEST = 4.0  # a step that takes so many times longer than expected was held up by something else


def bytes_touched(config: ModelConfig, packed_bytes: Mapping[str, int]) -> Callable[[int], float]:
    """How many bytes of weights a step of m tokens reads: of the experts those that they choose between them, evenly.

    packed_bytes: by part, as a program has them.
    """
    moes = [layer.feed_forward for layer in config.layers if isinstance(layer.feed_forward, MoeConfig)]
    experts = packed_bytes.get("experts", 0) if moes else 0
    rest = sum(packed_bytes.values()) - experts

    @cache
    def touched(num_tokens: int) -> float:
        parts = [distinct_experts(moe.num_experts, moe.router.top_k, num_tokens) / moe.num_experts for moe in moes]
        return rest + (experts * float(np.mean(parts)) if parts else 0.0)

    return touched


class StepTimes:
    """Seconds of a step of m tokens: a x bytes(m) + b x m, and what is seen at m itself."""

    def __init__(self, touched: Callable[[int], float]) -> None:
        self._touched, self._bytes_of_one = touched, touched(1)
        self._seen: dict[int, float] = {}
        self._per_byte, self._per_token = 1.0, _ROW_SHARE
        self._is_fitted = True

    @property
    def known(self) -> bool:
        """Whether anything was seen."""
        return bool(self._seen)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step was made."""
        if not 0 < num_tokens <= MOST_TOKENS:
            return
        expected = self.predict(num_tokens) if self._seen else seconds
        share = _NEW if num_tokens in self._seen else _FIRST
        self._seen[num_tokens] = expected + share * (min(seconds, _LONGEST * expected) - expected)
        self._is_fitted = False

    def predict(self, num_tokens: int) -> float:
        """Seconds; before anything was seen, in terms of what a token alone takes."""
        return self._seen.get(num_tokens) or self._formula(num_tokens)

    def _formula(self, num_tokens: int) -> float:
        if not self._is_fitted:
            self._fit()
        return self._per_byte * self._relative(num_tokens) + self._per_token * num_tokens

    def _relative(self, num_tokens: int) -> float:
        return self._touched(num_tokens) / self._bytes_of_one

    def _fit(self) -> None:
        """Least squares of relative errors, drawn towards the assumed share of a token's own work; none below 0.

        Written out: numpy's takes as long as a tenth of a small model's step.
        """
        scale = _ASSUMED / min(self._seen.values())
        rr, rm, mm = (_ROW_SHARE * scale) ** 2, -_ROW_SHARE * scale**2, scale**2
        r = m = rr_seen = mm_seen = 0.0
        for size, seconds in self._seen.items():
            bytes_s, tokens_s = self._relative(size) / seconds, size / seconds
            rr_seen, rm, mm_seen = rr_seen + bytes_s**2, rm + bytes_s * tokens_s, mm_seen + tokens_s**2
            r, m = r + bytes_s, m + tokens_s
        rr, mm = rr + rr_seen, mm + mm_seen
        determinant = rr * mm - rm * rm
        self._per_byte = (r * mm - m * rm) / determinant
        self._per_token = (m * rr - r * rm) / determinant
        if self._per_byte < 0:
            self._per_byte, self._per_token = 0.0, m / mm_seen
        elif self._per_token < 0:
            self._per_byte, self._per_token = r / rr_seen, 0.0
        self._is_fitted = True
