"""What goes wrong in a cluster: devices fail, and some are slow."""

from dataclasses import dataclass

from numpy.random import Generator

from moesaic.checks import require


@dataclass(frozen=True, kw_only=True)
class Troubles:
    """What goes wrong. hours_between: failures of one device (0: none). repair_s: until its unit works again.

    slow_share of the devices compute `slowdown` times as long; a unit waits for the slowest of its own.
    """

    hours_between: float = 0.0
    repair_s: float = 60.0
    slow_share: float = 0.0
    slowdown: float = 1.0

    def __post_init__(self) -> None:
        require(self.hours_between >= 0 and self.repair_s >= 0, "hours and seconds of failures below 0; give 0 or more")
        require(0 <= self.slow_share <= 1, f"slow_share={self.slow_share}; use a share from 0 to 1")
        require(self.slowdown >= 1, f"slowdown={self.slowdown}; use 1 or more")

    def until_failure(self, generator: Generator, ranks: int) -> float:
        """Seconds until one of a unit's devices fails."""
        return generator.exponential(self.hours_between * 3600 / ranks) if self.hours_between else float("inf")

    def slow(self, generator: Generator, ranks: int) -> float:
        """By how much a unit of so many ranks computes longer."""
        return self.slowdown if generator.random() < 1 - (1 - self.slow_share) ** ranks else 1.0
