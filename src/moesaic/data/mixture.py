"""Which domain each sample comes from: shares kept exactly, in any order of asking. D domains.

Samples are dealt in decks. After each deck every domain has been dealt its share of all samples so far, rounded, and
within a deck it stays within a sample or two of it. A sample's domain, and its number within the domain, are pure
functions of its number.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from moesaic.errors import DataError

Weights = Mapping[str, float] | Literal["proportional", "uniform"]

DECK_SIZE = 1024  # samples, to within half a sample for each domain
MOST_WEIGHT = 1e100  # all together: far below where sums of floats overflow
EPOCHS_TOLERANCE = 0.01  # of the run's length


class Samples(NamedTuple):
    """Of each sample: its domain, and how many of that domain were dealt before it."""

    domains: np.ndarray
    dealt_before: np.ndarray


class Mixture:
    """Deals samples of domains by `weights` [D], which need not add up to 1."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        total = math.fsum(weights)
        self.shares_D = np.array([weight / total for weight in weights])
        self._seed = seed
        self._deck = functools.lru_cache(maxsize=2)(self._shuffled)

    def samples(self, first: int, count: int) -> Samples:
        """The `count` samples (1 or more) from the one numbered `first` since the start of training."""
        deck = self._deck_of(first)
        skip = first - self._dealt(deck).sum()
        pieces: list[Samples] = []
        while count > 0:
            domains, dealt_before = self._deck(deck)
            pieces.append(Samples(domains[skip : skip + count], dealt_before[skip : skip + count]))
            count -= len(pieces[-1].domains)
            deck, skip = deck + 1, 0
        return Samples(*map(np.concatenate, zip(*pieces, strict=True)))

    def _dealt(self, deck: int) -> np.ndarray:
        """How many samples of each domain [D] come before a deck."""
        return np.floor(self.shares_D * (deck * DECK_SIZE) + 0.5).astype(np.int64)

    def _deck_of(self, number: int) -> int:
        deck = number // DECK_SIZE
        while self._dealt(deck).sum() > number:
            deck -= 1
        while self._dealt(deck + 1).sum() <= number:
            deck += 1
        return deck

    def _shuffled(self, deck: int) -> Samples:
        """Each domain's samples are spread evenly over the deck, each at random within its stretch."""
        before_D = self._dealt(deck)
        counts_D = self._dealt(deck + 1) - before_D
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self._seed, 0, deck))))
        domains = np.repeat(np.arange(len(counts_D)), counts_D)
        in_deck = np.arange(len(domains)) - np.repeat(np.cumsum(counts_D) - counts_D, counts_D)
        order = np.argsort((in_deck + generator.random(len(domains))) / counts_D[domains], kind="stable")
        return Samples(domains[order], (before_D[domains] + in_deck)[order])


def weights_of(names: Sequence[str], tokens: Sequence[int], weights: Weights) -> list[float]:
    """A weight for each domain. Raises DataError for unknown domains and for what is no weight."""
    if weights == "uniform":
        return [1.0] * len(names)
    if weights == "proportional":
        return [float(count) for count in tokens]
    if not isinstance(weights, Mapping):
        raise DataError(f"weights={weights!r}; use 'proportional', 'uniform' or a weight for each domain")
    return _by_domain(names, weights, "weights")


def weights_of_epochs(
    names: Sequence[str],
    windows: Sequence[int],
    epochs: Mapping[str, float],
    run_windows: int,
    sequence_length: int,
    unit: str = "tokens",
) -> list[float]:
    """Weights with which a run of `run_windows` goes `epochs` times through each domain's `windows`.

    A window is `sequence_length` of `unit`. Raises DataError when the run is longer or shorter than that.
    """
    passes = _by_domain(names, epochs, "epochs")
    wanted = [count * times for count, times in zip(windows, passes, strict=True)]
    total = math.fsum(wanted)
    if abs(total - run_windows) > max(EPOCHS_TOLERANCE * run_windows, len(names)):
        raise DataError(
            f"the epochs of all domains add up to {round(total * sequence_length):,} {unit}, but the run trains on "
            f"{run_windows * sequence_length:,}; make it {total / run_windows:.4g} times as long, or multiply every "
            f"number of epochs by {run_windows / total:.4g}"
        )
    return wanted


def _by_domain(names: Sequence[str], values: Mapping[str, float], what: str) -> list[float]:
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise DataError(f"{what} for unknown domain {unknown[0]!r}; known: {', '.join(names)}")
    numbers = [float(values.get(name, 0.0)) for name in names]
    if not all(math.isfinite(number) and number >= 0 for number in numbers) or not any(numbers):
        raise DataError(f"{what} {dict(values)}; they must be numbers of 0 or more, and one above 0")
    if sum(numbers) > MOST_WEIGHT:
        raise DataError(f"{what} {dict(values)} add up to {sum(numbers):g}; use at most {MOST_WEIGHT:g}")
    return numbers
