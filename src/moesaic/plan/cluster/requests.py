"""What users ask: when requests come and how long they are. N requests."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from moesaic.checks import require
from moesaic.registry import Registry

ARRIVALS: Registry[Callable[[Generator, float, float], NDArray[np.float64]]] = Registry("arrival process")
"""Name -> a function from a generator, requests a second and seconds to the moments of arrival, rising."""


@ARRIVALS.register("poisson")
def _poisson(generator: Generator, rate: float, seconds: float) -> NDArray[np.float64]:
    """Each user for himself."""
    return np.sort(generator.uniform(0, seconds, generator.poisson(rate * seconds)))


@ARRIVALS.register("even")
def _even(generator: Generator, rate: float, seconds: float) -> NDArray[np.float64]:
    """At equal distances."""
    return np.arange(int(rate * seconds)) / rate


@ARRIVALS.register("bursts")
def _bursts(generator: Generator, rate: float, seconds: float) -> NDArray[np.float64]:
    """In crowds: gamma distances with a standard deviation of three times their mean."""
    shape = 1 / 9
    distances = generator.gamma(shape, 1 / (rate * shape), int(2 * rate * seconds) + 100)
    moments = np.cumsum(distances)
    return moments[moments < seconds]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests of one kind: `rate` a second, lengths in tokens on average, spread log-normally by `spread` (0: all
    alike). cached: the share of a prompt's tokens whose state is kept from before."""

    rate: float
    prompt: float = 2048.0
    output: float = 512.0
    spread: float = 0.5
    cached: float = 0.0
    arrivals: str = "poisson"

    def __post_init__(self) -> None:
        require(self.rate > 0, f"rate={self.rate} requests a second; give more than 0")
        lengths = f"prompts of {self.prompt} and outputs of {self.output} tokens"
        require(self.prompt >= 1 and self.output >= 1, f"{lengths}; give 1 or more")
        require(0 <= self.cached < 1, f"cached={self.cached}; use a share from 0 to below 1")
        require(self.spread >= 0, f"spread={self.spread}; use 0 or more")

    def lengths(self, generator: Generator, mean: float, count: int) -> NDArray[np.int64]:
        """`count` lengths of 1 or more whose mean is expected to be `mean`."""
        drawn = generator.lognormal(-(self.spread**2) / 2, self.spread, count) * mean
        return np.maximum(1, np.rint(drawn)).astype(np.int64)
