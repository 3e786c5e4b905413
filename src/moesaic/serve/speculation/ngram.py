"""Drafts from the text itself: what followed the last time that it stood as it stands now.

Prompt lookup: no model, and right where a text quotes, edits or repeats.
"""

from collections.abc import Sequence

from moesaic.serve.choice.writing import Writing
from moesaic.serve.speculation.drafter import Drafter, Wanted


class NgramDrafter(Drafter):
    """Looks for the longest end of a text, of `longest` to `shortest` tokens, that it has had before; drafts the `most`
    tokens that followed there. Of several places the last counts."""

    free = True

    def __init__(self, *, longest: int = 5, shortest: int = 2, most: int = 8) -> None:
        self._sizes, self._most = range(longest, shortest - 1, -1), most
        self._places: dict[Writing, _Places] = {}

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [self._of(each.writing, min(each.room, self._most)) for each in wanted]

    def forget(self, writing: Writing) -> None:
        self._places.pop(writing, None)

    def _of(self, writing: Writing, room: int) -> list[int]:
        places = self._places.get(writing)
        if places is None:
            places = self._places[writing] = _Places(self._sizes)
        return places.follow(writing.token_ids, room)


class _Places:
    """Where each run of tokens of a text has last ended, but for those at its end; kept up as it grows."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._ends: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in sizes}
        self._seen = 0

    def follow(self, token_ids: Sequence[int], room: int) -> list[int]:
        """What followed the text's end before; over again where it is followed by itself."""
        self._catch_up(token_ids)
        total = len(token_ids)
        for size, ends in self._ends.items():
            end = ends.get(tuple(token_ids[-size:])) if total > size else None
            if end is not None:
                return [token_ids[end + step % (total - end)] for step in range(room)]
        return []

    def _catch_up(self, token_ids: Sequence[int]) -> None:
        """Runs that end before the last token: those that something has followed."""
        for end in range(self._seen + 1, len(token_ids)):
            for size, ends in self._ends.items():
                if end >= size:
                    ends[tuple(token_ids[end - size : end])] = end
        self._seen = max(0, len(token_ids) - 1)
