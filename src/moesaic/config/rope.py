"""Rotary positions: which dimensions of a head turn, how fast, and how the angles are stretched. No torch here."""

import math
from dataclasses import dataclass
from typing import Literal

from moesaic.checks import require, require_positive


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """All angles divided by `factor` (Position Interpolation, arXiv:2306.15595, eq. 4)."""

    factor: float

    def __post_init__(self) -> None:
        _require_factor(self.factor)


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Slow dimensions divided by `factor`, fast ones left alone, a ramp between (YaRN, arXiv:2309.00071, sec. 3.2).

    original_length: the context, in tokens, of the training before. beta_fast, beta_slow: dimensions that turn more
    often than beta_fast times in it are fast, less often than beta_slow times slow. truncate: whether the ends of the
    ramp are rounded outwards to whole dimensions (gpt-oss has them as they are).
    attention_factor multiplies cosines and sines; None: mscale's correction divided by mscale_all_dim's where both
    are given, else 0.1 ln(factor) + 1 (eq. 22). mscale_all_dim also corrects the scale of latent attention's scores
    (DeepSeek-V2, arXiv:2405.04434, sec. 3.1.4; see MlaConfig).
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _require_factor(self.factor)
        require_positive(self, "original_length")
        require(
            0 < self.beta_slow <= self.beta_fast,
            f"beta_slow={self.beta_slow} and beta_fast={self.beta_fast}; beta_slow must be above 0 and the smaller one",
        )

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _correction(self.factor, self.mscale) / _correction(self.factor, self.mscale_all_dim)
        return _correction(self.factor)

    @property
    def score_factor(self) -> float:
        """What latent attention multiplies its scores by."""
        return _correction(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclass(frozen=True, kw_only=True)
class Llama3Config:
    """As Llama 3.1: wavelengths above original_length / low_freq_factor divided by `factor`, below original_length /
    high_freq_factor left alone, in between interpolated (arXiv:2407.21783, sec. 3.4.2, and Meta's `apply_scaling`).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self) -> None:
        _require_factor(self.factor)
        require_positive(self, "original_length")
        low, high = self.low_freq_factor, self.high_freq_factor
        require(0 < low <= high, f"low_freq_factor={low} and high_freq_factor={high}; they must be above 0 and rising")


@dataclass(frozen=True, kw_only=True)
class LongRopeConfig:
    """Every pair divided by a factor of its own, of one list in texts of up to `original_length` tokens and of another
    in longer ones (LongRoPE, arXiv:2402.13753, sec. 3.2, as Phi-3.5-MoE has it).

    short_factor, long_factor: the two lists. short_mscale, long_mscale: what cosines and sines are multiplied by then.
    A text that grows past original_length is turned anew from its first token on: see KeyValueCache.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    short_mscale: float
    long_mscale: float

    def __post_init__(self) -> None:
        require_positive(self, "original_length")
        for name in ("short_factor", "long_factor"):
            sane = all(0 < each < math.inf for each in getattr(self, name))
            require(sane, f"{name}={getattr(self, name)}; each of them must be above 0 and finite")
        for name in ("short_mscale", "long_mscale"):
            require(0 < getattr(self, name) < math.inf, f"{name}={getattr(self, name)}; it must be above 0 and finite")


RopeScaling = LinearConfig | YarnConfig | Llama3Config | LongRopeConfig


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions (RoFormer, arXiv:2104.09864, eq. 34): pairs of dimensions turn by position * theta^(-2i/R).

    layout: "half" pairs dimension i with i + R/2, "interleaved" 2i with 2i + 1 (the paper's).
    rotary_dim: R, so many dimensions in front of a head turn and the others stay; None: the whole head.
    scaling: how the angles are stretched for contexts longer than in training.
    """

    theta: float = 10_000.0
    layout: Literal["half", "interleaved"] = "half"
    rotary_dim: int | None = None
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        require(self.theta > 0, f"rope theta={self.theta}; it must be above 0")
        require(self.layout in ("half", "interleaved"), f"rope layout={self.layout!r}; known: half, interleaved")
        if self.rotary_dim is not None:
            require_positive(self, "rotary_dim")

    def turning(self, head_dim: int) -> int:
        """How many dimensions of a head turn. Raises ConfigError for an odd number, or more than there are."""
        turning = self.rotary_dim or head_dim
        what = "head_dim" if self.rotary_dim is None else "rotary_dim"
        require(turning % 2 == 0, f"{what}={turning} is odd; rotary positions need an even one")
        require(turning <= head_dim, f"rotary_dim={turning} is more than head_dim={head_dim}; use {head_dim} at most")
        if isinstance(self.scaling, LongRopeConfig):
            for name in ("short_factor", "long_factor"):
                given = len(getattr(self.scaling, name))
                require(given == turning // 2, f"{name} has {given} numbers; give {turning // 2}, one for each pair")
        return turning

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by, in texts that are not too long for it."""
        if isinstance(self.scaling, LongRopeConfig):
            return self.scaling.short_mscale
        return self.scaling.magnitude if isinstance(self.scaling, YarnConfig) else 1.0


def _require_factor(factor: float) -> None:
    require(1 <= factor < math.inf, f"rope factor={factor}; it must be 1 or more, and finite")


def _correction(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
