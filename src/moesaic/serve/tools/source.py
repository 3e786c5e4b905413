"""Text that is still coming, as parsers read it: nothing is handed on that may be the beginning of a mark."""

import re
from collections.abc import Callable, Generator
from typing import TypeVar

from moesaic.serve.tools.parts import Part, Parts

P = TypeVar("P", bound=Part)
Waiting = Generator[None, None, str]


class Source:
    """Text that has come and has not been read. closed: no more will."""

    def __init__(self) -> None:
        self.text = ""
        self.closed = False

    def take(self, size: int) -> str:
        taken, self.text = self.text[:size], self.text[size:]
        return taken

    def until(self, *marks: str) -> Generator[str | None, None, str]:
        """The text before the first of the marks, in pieces; returns the mark, or "" at the end of all text."""
        while True:
            found = [(place, -len(mark), mark) for mark in marks if (place := self.text.find(mark)) >= 0]
            if found:
                place, _, mark = min(found)
                if place:
                    yield self.take(place)
                self.take(len(mark))
                return mark
            sure = len(self.text) - (0 if self.closed else beginning_at_end(self.text, marks))
            if sure:
                yield self.take(sure)
            if self.closed:
                return ""
            yield None

    def all_until(self, *marks: str) -> Generator[None, None, tuple[str, str]]:
        """All of the text before the first of the marks, once it has come, and the mark."""
        pieces: list[str] = []
        reading = self.until(*marks)
        while True:
            try:
                piece = next(reading)
            except StopIteration as stop:
                return "".join(pieces), stop.value
            if piece is None:
                yield None
            else:
                pieces.append(piece)

    def spaces(self) -> Waiting:
        """Skip white space; returns the character behind it, unread, or "" at the end."""
        while True:
            self.text = self.text.lstrip()
            if self.text or self.closed:
                return self.text[:1]
            yield None

    def match(self, pattern: re.Pattern[str], *ends: str) -> Generator[None, None, re.Match[str] | None]:
        """Read what a pattern matches here; None, with nothing read, once one of the ends has come or all text has."""
        while True:
            matched = pattern.match(self.text)
            if matched:
                self.take(matched.end())
                return matched
            if self.closed or any(end in self.text for end in ends):
                return None
            yield None

    def json_value(self) -> Generator[str | None, None, None]:
        """An object or a list, in pieces up to its last bracket, or what there is of it."""
        depth, in_text, escaped = 0, False, False
        while True:
            for place, character in enumerate(self.text):
                if in_text:
                    escaped, in_text = character == "\\" and not escaped, character != '"' or escaped
                elif character in "{[":
                    depth += 1
                elif character in "}]":
                    depth -= 1
                    if depth <= 0:
                        yield self.take(place + 1)
                        return
                else:
                    in_text = character == '"'
            if self.text:
                yield self.take(len(self.text))
            if self.closed:
                return
            yield None


def beginning_at_end(text: str, marks: tuple[str, ...]) -> int:
    """Length of the longest end of a text with which one of the marks begins."""
    most = min(len(text), max((len(mark) - 1 for mark in marks), default=0))
    return next((size for size in range(most, 0, -1) if any(mark.startswith(text[-size:]) for mark in marks)), 0)


R = TypeVar("R")


def each_as(kind: Callable[[str], P], texts: Generator[str | None, None, R]) -> Generator[P | None, None, R]:
    """Pieces of text as parts of a kind; returns what the reading returns."""
    while True:
        try:
            text = next(texts)
        except StopIteration as stop:
            return stop.value
        yield None if text is None else kind(text)


class Parser:
    """A parser that is fed text as it comes."""

    def __init__(self, parse: Callable[[Source], Parts]) -> None:
        self._source = Source()
        self._parts = parse(self._source)
        self._ended = False

    def feed(self, text: str) -> list[Part]:
        """What is now certain."""
        self._source.text += text
        return self._ready()

    def close(self) -> list[Part]:
        """What is left when no more text comes."""
        self._source.closed = True
        return self._ready()

    def _ready(self) -> list[Part]:
        found: list[Part] = []
        while not self._ended:
            try:
                part = next(self._parts)
            except StopIteration:
                self._ended = True
                break
            if part is None:
                break
            found.append(part)
        return found
