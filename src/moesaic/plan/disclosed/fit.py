"""Three efficiency constants, fitted to disclosed speeds of others: no row has a part in its own prediction.

C cases, G combinations of constants.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from moesaic.plan.disclosed.speed import Case, Constants

COMPUTE = tuple(round(0.2 + 0.025 * step, 3) for step in range(17))
NETWORK = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TRAINING = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""What is tried of each constant."""


class Predicted(NamedTuple):
    """A case, what was predicted of it, and with which constants."""

    case: Case
    value: float
    constants: Constants

    @property
    def error(self) -> float:
        return self.value / self.case.disclosed - 1


class Values:
    """What every combination of constants says of every case."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = list(cases)
        self.combinations = [Constants(*each) for each in product(COMPUTE, NETWORK, TRAINING)]
        self.values_GC = np.array([[case.predict(each) for case in cases] for each in self.combinations])
        self.errors_GC = np.abs(np.log(self.values_GC / np.array([case.disclosed for case in cases])))

    def predict_each(self, *, by_source: bool = False) -> list[Predicted]:
        """Each case by the constants with the smallest mean |log(predicted / disclosed)| over the other cases.

        by_source: over those of other groups only, so that rows of one measurement say nothing about each other.
        """
        return [self._predict(index, by_source) for index in range(len(self.cases))]

    def _predict(self, index: int, by_source: bool) -> Predicted:
        group = self.cases[index].group
        others = [
            other for other, case in enumerate(self.cases) if other != index and not (by_source and case.group == group)
        ]
        best = int(self.errors_GC[:, others].mean(axis=1).argmin())
        return Predicted(self.cases[index], float(self.values_GC[best, index]), self.combinations[best])


def median_error(predicted: Sequence[Predicted]) -> float:
    """Of the absolute errors."""
    return float(np.median([abs(each.error) for each in predicted]))
