"""Chat templates as programs that can do no harm: a sandbox, and limits to the time and the size that they may take.

They come with downloaded files. The sandbox is jinja2's immutable one, the names are those that transformers gives.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from moesaic.errors import GenerationError

MAX_CHARACTERS = 16_000_000  # of a prompt: more than the longest contexts hold
TIME_S = 10.0
_TICKS_PER_LOOK = 256  # rounds of loops between two looks at the clock


class RefusedError(Exception):
    """Raised by a template through raise_exception(...)."""


class TooMuchError(Exception):
    """A template that runs for too long or writes too much."""


class _Meter:
    """What one rendering may still take."""

    def __init__(self, time_s: float) -> None:
        self.time_s, self.deadline = time_s, time.monotonic() + time_s
        self._ticks = 0

    def tick(self) -> None:
        self._ticks += 1
        if self._ticks % _TICKS_PER_LOOK == 0 and time.monotonic() > self.deadline:
            raise TooMuchError(f"it ran for more than {self.time_s:g} s")


# Filters and operators are told nothing of the rendering that they are part of.
_METER: ContextVar[_Meter] = ContextVar("meter of the template being rendered")


def render_template(template: str, variables: Mapping[str, Any], *, time_s: float = TIME_S) -> str:
    """The text that a template makes of variables.

    Raises GenerationError for one that is broken, fails, refuses, or takes too much.
    """
    token = _METER.set(_Meter(time_s))
    try:
        return _joined(_compiled(template).generate(dict(variables)))
    except RefusedError as error:
        raise GenerationError(f"the chat template refuses these messages: {error}") from error
    except TooMuchError as error:
        raise GenerationError(f"the chat template was stopped: {error}; use another one") from error
    except jinja2.TemplateSyntaxError as error:
        raise GenerationError(
            f"the chat template is broken at line {error.lineno}: {error.message}; use another one"
        ) from error
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise GenerationError(
            f"the chat template failed ({type(error).__name__}: {error}); check the messages"
        ) from error
    finally:
        _METER.reset(token)


def _joined(pieces: Iterator[str]) -> str:
    found, size = [], 0
    for piece in pieces:
        size += len(piece)
        _check_size(size)
        found.append(piece)
    return "".join(found)


def _check_size(size: float) -> None:
    if size > MAX_CHARACTERS:
        raise TooMuchError(f"it wrote more than {MAX_CHARACTERS:,} characters")


def _metered(values: Any) -> Iterator[Any]:
    """What a loop goes over."""
    meter = _METER.get()
    for value in values:
        meter.tick()
        yield value


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Every loop, call and growing text is counted."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(loop.iter, "metered", [], [], None, None, lineno=loop.lineno)
        return tree

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _METER.get().tick()
        if isinstance(getattr(__obj, "__self__", None), str):  # 'x'.ljust(1000000000)
            _check_size(max((each for each in args if isinstance(each, int)), default=0))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        _METER.get().tick()
        _check_size(_size_of_result(operator, left, right))
        return super().call_binop(context, operator, left, right)


def _size_of_result(operator: str, left: Any, right: Any) -> float:
    """At most; digits of numbers count like characters."""
    if operator == "*" and isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length()
    if operator == "*":
        pairs = ((left, right), (right, left))
        return max((_length(text) * times for text, times in pairs if isinstance(times, int)), default=0)
    if operator == "**":
        return float(left.bit_length() * right) if isinstance(left, int) and isinstance(right, int) else 0
    if operator == "%" and isinstance(left, str):
        return _widest(left)
    return _length(left) + _length(right)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _widest(form: str) -> int:
    """The greatest number in a format such as "%1000s"; "%*s" would take it from elsewhere."""
    digits = "".join(character if character.isdecimal() else " " for character in form)
    return (
        MAX_CHARACTERS + 1 if "*" in form else max((int(each) for each in digits.split() if len(each) < 99), default=0)
    )


def _refuse(message: str) -> NoReturn:
    raise RefusedError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter would escape characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks the assistant's words for training; here only the inside counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.filters["metered"] = _metered
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)
