"""Responses that can be gone on from: in memory, the newest so many."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moesaic.serve.http.errors import ApiError, refused


class Stored(NamedTuple):
    """A response, the messages that led to it and the answer's own. owner: whose key asked for it."""

    response: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]
    owner: str | None


class ResponseStore:
    """Forgets the oldest beyond `size`. An owner finds only what is theirs."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def keep(self, stored: Stored) -> None:
        self._stored[stored.response["id"]] = stored
        while len(self._stored) > self._size:
            self._stored.popitem(last=False)

    def before(self, identity: str | None, owner: str | None) -> Sequence[Mapping[str, Any]]:
        """The messages up to a response; none for None. Raises ApiError for one that is not there."""
        if identity is None:
            return []
        if (stored := self._find(identity, owner)) is None:
            raise refused(
                f"Previous response with id '{identity}' not found; this server keeps the newest {self._size}.",
                "previous_response_id",
                "previous_response_not_found",
            )
        return stored.messages

    def find(self, identity: str, owner: str | None) -> Stored:
        """Raises ApiError for one that is not there."""
        if (stored := self._find(identity, owner)) is None:
            raise ApiError(404, f"Response with id '{identity}' not found.", param="response_id")
        return stored

    def forget(self, identity: str, owner: str | None) -> None:
        """Raises ApiError for one that is not there."""
        self.find(identity, owner)
        del self._stored[identity]

    def _find(self, identity: str, owner: str | None) -> Stored | None:
        stored = self._stored.get(identity)
        return stored if stored is not None and stored.owner == owner else None
