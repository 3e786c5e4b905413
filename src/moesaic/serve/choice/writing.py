"""One request as it is being written: its tokens, the text that is certain, and whether it has ended."""

from collections.abc import Callable

from moesaic.data.text_stream import TextStream
from moesaic.serve.choice.guidance import Guide
from moesaic.serve.choice.rules import Rules
from moesaic.serve.request import Finished, Progress, Request, TokenInfo, Usage


class Writing:
    """What has been written of a request.

    token_ids: the prompt's and the new ones. most: the longest it may get, prompt included.
    """

    def __init__(
        self, request: Request, decode: Callable[[list[int]], str], max_length: int, guide: Guide | None = None
    ) -> None:
        self.request, self.guide = request, guide
        self.rules = Rules(request)
        self.token_ids = list(request.prompt_ids)
        self.most = min(max_length, len(self.token_ids) + request.max_new_tokens)
        self.cached_tokens = self.drafted = self.accepted = 0
        self.stopped_by: str | int | None = None
        self._stream = TextStream(decode, self._hear, request.prompt_ids)
        self._held = ""  # certain but for a stop text that may begin in it
        self._ready = ""

    @property
    def num_new(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def ended(self) -> bool:
        stopped = self.stopped_by is not None or (self.guide is not None and self.guide.ended)
        return stopped or len(self.token_ids) >= self.most

    def add(self, tokens: list[TokenInfo]) -> Progress:
        """Take tokens up to where the text ends; the rest is dropped."""
        taken: list[TokenInfo] = []
        for info in tokens:
            if self.ended or (self.guide is not None and not self.guide.add(info.token_id)):
                break
            self.token_ids.append(info.token_id)
            taken.append(info)
            if info.token_id in self.request.eos_token_ids and self.num_new >= self.request.min_new_tokens:
                self.stopped_by = info.token_id
            else:
                self._stream.add(info.token_id)
        if self.ended and not isinstance(self.stopped_by, str):
            self._stream.close()
            self._ready, self._held = self._ready + self._held, ""
        text, self._ready = self._ready, ""
        return Progress(tuple(taken), text)

    def give_up(self) -> str:
        """End it as it stands: the text that was held back."""
        if self.stopped_by is None:
            self._stream.close()
        text, self._ready, self._held = self._ready + self._held, "", ""
        return text

    def finished(self) -> Finished:
        """Raises nothing; only for one that has ended."""
        if self.guide is not None and self.guide.error:
            return Finished("error", self.usage(), error=self.guide.error)
        stopped = self.stopped_by is not None or (self.guide is not None and self.guide.ended)
        return Finished("stop" if stopped else "length", self.usage(), self.stopped_by)

    def usage(self) -> Usage:
        return Usage(len(self.request.prompt_ids), self.num_new, self.cached_tokens, self.drafted, self.accepted)

    def _hear(self, text: str) -> None:
        """New text: all of it is certain but an end with which a stop text may begin."""
        if self.stopped_by is not None:
            return
        self._held += text
        found = [(place, stop) for stop in self.request.stop if (place := self._held.find(stop)) >= 0]
        if found:
            place, stop = min(found)
            self.stopped_by = stop
            self._ready += self._held[: place + len(stop) * self.request.include_stop]
            self._held = ""
            return
        sure = len(self._held) - _beginnings(self._held, self.request.stop)
        self._ready, self._held = self._ready + self._held[:sure], self._held[sure:]


def _beginnings(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of a text with which a stop text begins."""
    most = min(len(text), max((len(stop) - 1 for stop in stops), default=0))
    return next((size for size in range(most, 0, -1) if any(stop.startswith(text[-size:]) for stop in stops)), 0)
