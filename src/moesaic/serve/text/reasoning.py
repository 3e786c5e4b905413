"""What a model says to itself before it answers, told apart from the answer."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from moesaic.serve.tools.parts import CallBegun, Part, Parts, Said, Thought
from moesaic.serve.tools.source import Parser, Source, each_as


class Marks(NamedTuple):
    """What stands around thoughts."""

    opening: str
    closing: str


MARKS = (Marks("<think>", "</think>"), Marks("[THINK]", "[/THINK]"))


def marks_of(template: str) -> Marks | None:
    """The marks that a chat template knows; None: its model does not think aloud."""
    return next((marks for marks in MARKS if marks.closing in template), None)


def opened(prompt: str, marks: Marks) -> bool:
    """Whether a prompt ends inside thoughts, as those of R1 do."""
    return prompt.rstrip().endswith(marks.opening)


def thoughts_first(source: Source, marks: Marks, is_open: bool) -> Parts:
    """Thoughts at the beginning, then everything else as what is said."""
    while not is_open:
        begun = source.text.lstrip()
        if begun.startswith(marks.opening):
            source.text = begun.removeprefix(marks.opening)
            is_open = True
        elif marks.opening.startswith(begun) and not source.closed:
            yield None
        else:
            break
    if is_open:
        yield from each_as(Thought, source.until(marks.closing))
    yield from each_as(Said, source.until())


class AnswerParser:
    """Parts of an answer from its text as it comes.

    marks: of thoughts; None: there are none. parse: of what is not thought, for tool calls. Spaces around thoughts and
    before calls are no part of either.
    """

    def __init__(self, marks: Marks | None, is_open: bool, parse: Callable[[Source], Parts] | None) -> None:
        self._thinking = None if marks is None else Parser(lambda source: thoughts_first(source, marks, is_open))
        self._calling = None if parse is None else Parser(parse)
        self._trim = _Trim()
        self.thinks = is_open

    def feed(self, text: str) -> list[Part]:
        """What is now certain."""
        parts = [Said(text)] if self._thinking is None else self._thinking.feed(text)
        return self._seen(self._trim(part for each in parts for part in self._inner(each)))

    def close(self) -> list[Part]:
        """What is left when no more text comes."""
        parts = [] if self._thinking is None else self._thinking.close()
        rest = [] if self._calling is None else self._calling.close()
        found = self._trim([*(part for each in parts for part in self._inner(each)), *rest])
        return self._seen([*found, *self._trim.close()])

    def _inner(self, part: Part) -> Sequence[Part]:
        return self._calling.feed(part.text) if isinstance(part, Said) and self._calling is not None else [part]

    def _seen(self, parts: list[Part]) -> list[Part]:
        if parts:
            self.thinks = isinstance(parts[-1], Thought)
        return parts


class _Trim:
    """Drops empty texts, line breaks around thoughts, and spaces between words and calls."""

    def __init__(self) -> None:
        self._kind: type[Part] | None = None
        self._held = ""  # spaces at the end of what has come
        self._fresh = False  # nothing but spaces has come of this kind

    def __call__(self, parts: Iterable[Part]) -> list[Part]:
        return [found for part in parts for found in self._one(part)]

    def close(self) -> list[Part]:
        """The end of what was said belongs to it."""
        held, self._held = self._held, ""
        return [Said(held)] if held and self._kind is Said else []

    def _one(self, part: Part) -> list[Part]:
        if not isinstance(part, Said | Thought):
            self._kind, self._held = CallBegun, ""
            return [part]
        kind = type(part)
        if kind is not self._kind:
            self._fresh = kind is Thought or self._kind is not None
            self._kind, self._held = kind, ""
        text = self._held + part.text
        if self._fresh:
            text = text.lstrip()
        kept = text.rstrip()
        self._held = text[len(kept) :]
        self._fresh = self._fresh and not kept
        return [kind(kept)] if kept else []
