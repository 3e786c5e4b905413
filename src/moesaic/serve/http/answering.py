"""One answer as it comes: its parts, the calls in it, and the tokens that were thoughts."""

import uuid
from collections.abc import Iterable
from typing import Any

from moesaic.serve.request import Progress, TokenInfo
from moesaic.serve.text.dialogue import Prepared
from moesaic.serve.tools.parts import CallArguments, CallBegun, Part, Said, Thought


class Answering:
    """Turns events into parts. Every call has an id of its own; `many`: those after the first count, too."""

    def __init__(self, prepared: Prepared, *, many: bool = True) -> None:
        self._form, self._many = prepared.form, many
        self._parser = prepared.parser()
        self._ids: list[str] = []
        self._dropping = False
        self.reasoning_tokens = 0

    @property
    def calls(self) -> int:
        return len(self._ids)

    def progress(self, event: Progress) -> list[Part]:
        """What is now certain. Call ids are always there."""
        if self._parser is None:
            return [Said(event.text)] if event.text else []
        parts = self._parser.feed(event.text)
        self.reasoning_tokens += len(event.tokens) * self._parser.thinks
        return list(self._kept(parts))

    def close(self) -> list[Part]:
        """What is left at the end."""
        return [] if self._parser is None else list(self._kept(self._parser.close()))

    def _kept(self, parts: Iterable[Part]) -> Iterable[Part]:
        for part in parts:
            if isinstance(part, CallBegun):
                self._dropping = bool(self._ids) and not self._many
                if not self._dropping:
                    yield CallBegun(part.name, self._new_id(part))
            elif not (self._dropping and isinstance(part, CallArguments)):
                yield part

    def _new_id(self, call: CallBegun) -> str:
        identity = call.id or self._form.call_id(call.name, len(self._ids))
        if identity in self._ids:
            identity = f"call_{uuid.uuid4().hex[:24]}"
        self._ids.append(identity)
        return identity


class Whole:
    """An answer when it has ended: what was said and thought, and the calls with their ids."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.said = self.thought = ""
        self.calls: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, Said):
                self.said += part.text
            elif isinstance(part, Thought):
                self.thought += part.text
            elif isinstance(part, CallBegun):
                self.calls.append({"id": part.id, "name": part.name, "arguments": ""})
            else:
                self.calls[-1]["arguments"] += part.text


def without_end(tokens: Iterable[TokenInfo], eos_token_ids: frozenset[int]) -> list[TokenInfo]:
    """The tokens that are text: not that which ended it."""
    return [info for info in tokens if info.token_id not in eos_token_ids]
