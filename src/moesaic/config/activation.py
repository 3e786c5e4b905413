"""What stands between the projections of a feed-forward block. No torch here."""

import math
from dataclasses import dataclass

from moesaic.checks import require


@dataclass(frozen=True, kw_only=True)
class ClampedSwiglu:
    """(up + shift) * gate * sigmoid(alpha * gate) of clamped halves: gate at most `limit`, up from -limit to limit.

    With shift 1 and alpha 1.702 that of gpt-oss (openai/gpt-oss, `swiglu`); with the defaults SwiGLU
    (arXiv:2002.05202, eq. 6) but for the limit, as DeepSeek-V4 has it (arXiv:2606.19348).
    """

    limit: float
    alpha: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        require(0 < self.limit < math.inf, f"limit={self.limit} in ClampedSwiglu; it must be above 0 and finite")
        require(0 < self.alpha < math.inf, f"alpha={self.alpha} in ClampedSwiglu; it must be above 0 and finite")
        require(math.isfinite(self.shift), f"shift={self.shift} in ClampedSwiglu; it must be finite")


Activation = str | ClampedSwiglu
"""A name of `moesaic.kernels.activations`, or a clamped SwiGLU with its figures."""
