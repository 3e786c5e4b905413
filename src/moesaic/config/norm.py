"""What a norm is. No torch here."""

from dataclasses import dataclass

from moesaic.checks import require


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """RMSNorm (Zhang & Sennrich, arXiv:1910.07467, eq. 4) with a learned weight."""

    eps: float = 1e-6

    def __post_init__(self) -> None:
        require(self.eps > 0, f"norm eps={self.eps}; it must be above 0")
