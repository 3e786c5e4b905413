"""A conversation as the prompt that a model was trained on, by the chat template that came with it.

Templates are programs from downloaded files: they run in jinja2's immutable sandbox, with the names that
transformers gives.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from moesaic.errors import GenerationError

Message = Mapping[str, Any]


def render_chat(
    template: str | None,
    messages: Sequence[Message],
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    add_generation_prompt: bool = True,
    now: Callable[[], datetime] = datetime.now,
) -> str:
    """The prompt for messages like {"role": "user", "content": "..."}, ending where the assistant's answer begins.

    `now` is the clock of templates that print the date.
    Raises GenerationError for a missing or broken template, and for messages that the template refuses.
    """
    if not template:
        raise GenerationError("this model has no chat template; continue plain text with `moesaic generate` instead")
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or "content" not in message:
            seen = ", ".join(message) or "neither"
            raise GenerationError(f'message {index} needs "role" and "content"; it has {seen}')
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    try:
        return _compiled(template).render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=lambda form: now().strftime(form),
            **{name: token for name, token in tokens.items() if token is not None},
        )
    except _RefusedError as error:
        raise GenerationError(f"the chat template refuses these messages: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise GenerationError(
            f"the chat template is broken at line {error.lineno}: {error.message}; use another one"
        ) from error
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise GenerationError(
            f"the chat template failed ({type(error).__name__}: {error}); check the messages"
        ) from error


class _RefusedError(Exception):
    """Raised by a template through raise_exception(...)."""


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


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
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)
