"""Which replica a request goes to: the one that has most of its prompt cached, unless that one is busy."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

BLOCK_BYTES = 256
MOST_BLOCKS = 256
_ALWAYS_ROOM = 2  # requests
_REMEMBERED = 100_000  # beginnings; each is a hash and a name


def prompt_of(body: bytes) -> bytes:
    """What of a request's body the prompt is made of, in an order in which beginnings are shared; b"" for none.

    Tools and instructions stand in front, as templates put them.
    """
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError):
        return b""
    if not isinstance(fields, dict):
        return b""
    names = ("model", "tools", "system", "instructions", "messages", "input", "prompt")
    return json.dumps([fields[name] for name in names if name in fields], ensure_ascii=False).encode("utf-8", "replace")


def beginnings(prompt: bytes) -> list[bytes]:
    """A hash of each beginning of whole blocks, the shortest first, up to MOST_BLOCKS of them."""
    running, found = hashlib.blake2b(digest_size=12), []
    for start in range(0, min(len(prompt), MOST_BLOCKS * BLOCK_BYTES) - BLOCK_BYTES + 1, BLOCK_BYTES):
        running.update(prompt[start : start + BLOCK_BYTES])
        found.append(running.digest())
    return found


class PrefixMap:
    """Remembers which replica saw which beginnings of prompts last, and chooses by that and by load.

    slack: a replica takes no more than this times its share of all running requests, so that one popular beginning
    does not fill one replica while others are idle (consistent hashing with bounded loads, arXiv:1608.01350). Two
    always have room: the end of an answer is heard of late, and whoever asks again is not to lose their cache by that.
    """

    def __init__(self, slack: float = 1.5, remembered: int = _REMEMBERED) -> None:
        self.slack, self.remembered = slack, remembered
        self._seen: OrderedDict[bytes, str] = OrderedDict()
        self._turn = 0  # of those that have no beginning, which go to all in turn

    def choose(self, prefix: Sequence[bytes], running: Mapping[str, int]) -> list[str]:
        """All replicas, the best first. running: the requests that each has now.

        First those that have room, then by the length of the beginning that they saw, then the least busy. What is left
        is the same for the same beginning, so that it finds the same replica before it was remembered.
        """
        share = (sum(running.values()) + 1) / max(1, len(running))
        most = max(_ALWAYS_ROOM, share * self.slack)
        depth = self._depths(prefix)
        self._turn += not prefix
        first = prefix[0] if prefix else str(self._turn).encode()

        def rank(replica: str) -> tuple[bool, int, int, bytes]:
            tie = hashlib.blake2b(first + replica.encode(), digest_size=8).digest()
            return (running[replica] + 1 > most, -depth.get(replica, 0), running[replica], tie)

        return sorted(running, key=rank)

    def remember(self, prefix: Sequence[bytes], replica: str) -> None:
        """A replica was sent a prompt with these beginnings."""
        for beginning in prefix:
            self._seen[beginning] = replica
            self._seen.move_to_end(beginning)
        while len(self._seen) > self.remembered:
            self._seen.popitem(last=False)

    def _depths(self, prefix: Sequence[bytes]) -> dict[str, int]:
        """How many of the blocks each replica saw."""
        found: dict[str, int] = {}
        for depth, beginning in enumerate(prefix, start=1):
            replica = self._seen.get(beginning)
            if replica is None:
                break  # longer beginnings were remembered with it, and longer ago
            found[replica] = depth
        return found
