"""A disclosed figure and what this planner makes of it."""

from typing import NamedTuple

WITHIN = 0.02
"""What an accounting row may be off by."""


class Row(NamedTuple):
    """`disclosed` as published, in `unit`; `predicted` by `how`. source: where it was published, and how sure that is.

    digits: decimals that it was published with.
    """

    what: str
    unit: str
    disclosed: float
    predicted: float
    how: str
    source: str
    digits: int = 0

    @property
    def error(self) -> float:
        return self.predicted / self.disclosed - 1

    @property
    def agrees(self) -> bool:
        """Within 2 %, or the same once rounded as it was published."""
        return abs(self.error) <= WITHIN or round(self.predicted, self.digits) == round(self.disclosed, self.digits)
