"""What the loop asks of those that guess.

As the token at a place is fixed by the model, the request's rules and the random number of its seed and place, a draft
is right if it is that token: what is written does not depend on drafts, whether tokens are drawn or not.
"""

from collections.abc import Sequence
from typing import NamedTuple

from moesaic.engine.cache import Text
from moesaic.serve.choice.writing import Writing
from moesaic.serve.seen import StepSeen


class Wanted(NamedTuple):
    """A text whose newest token is about to be run, and how many drafts may be run behind it.

    text: what the engine's cache holds, all tokens but the newest.
    """

    writing: Writing
    text: Text
    room: int


class Drafter:
    """Guesses how texts go on; all in the loop's thread.

    free: guesses take next to no time.
    """

    free = False

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """Tokens that may follow each of these texts; none where there is no guess, or it would not be worth it.

        Raises GenerationError where it cannot go on.
        """
        raise NotImplementedError

    def forget(self, writing: Writing) -> None:
        """This text has ended."""

    def hear(self, seen: StepSeen) -> None:
        """A step of the engine was made."""
