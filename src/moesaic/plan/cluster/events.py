"""A clock that jumps from event to event; what happens at the same moment happens in the order it was planned in."""

import heapq
from typing import Any, NamedTuple


class Event(NamedTuple):
    """What happens when: `kind` names it, `about` says to whom."""

    at: float
    number: int
    kind: str
    about: Any


class Clock:
    """The present (`now`, in seconds), and what is to come (`coming`, a heap)."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self.coming: list[Event] = []

    def plan(self, delay: float, kind: str, about: Any = None) -> None:
        """Let something happen so many seconds from now."""
        assert delay >= 0, "time goes forward"
        heapq.heappush(self.coming, Event(self.now + delay, self.num_events, kind, about))
        self.num_events += 1

    def next(self, before: float = float("inf")) -> Event | None:
        """Go to the next event; None where nothing comes any more, or only at `before` or later."""
        if not self.coming or self.coming[0].at >= before:
            return None
        event = heapq.heappop(self.coming)
        self.now = event.at
        return event
