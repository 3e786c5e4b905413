"""Checks the fields of a settings class against its annotations, and brings file values (lists) to their types.

Tables of a file (TOML, JSON) become dataclasses by `read_part`, and dataclasses tables by `table_of`.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moesaic.errors import ConfigError

P = TypeVar("P")

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "nothing"}


class _MisfitError(Exception):
    """A value that its annotation does not allow; never leaves this module."""


def settle(settings: Any, table: str) -> None:
    """Convert every field of a dataclass in place (lists to tuples, whole numbers to floats where a float is asked).

    `table` names it in errors. Raises ConfigError for a value of another type: what was given, what is allowed.
    """
    for name, annotation in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        object.__setattr__(settings, name, _fitted(value, annotation, f"{table}.{name}" if table else name))


def read_part(part: type[P], table: Any, where: str, **known: Any) -> P:
    """A dataclass from a table of its fields, in which tables stand for dataclasses of their own.

    `where` names the table in errors; `known` are fields given already. Raises ConfigError for a table that is none,
    for fields unknown, missing, or of another type, and for what the dataclass itself refuses.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{where}={shown(table)}; it must be a table of settings")
    refuse_unknown(where, table, [name for name in names_of(part) if name not in known])
    annotations = get_type_hints(part)
    values = {name: _read(value, annotations[name], f"{where}.{name}") for name, value in table.items()} | known
    missing = [field.name for field in dataclasses.fields(part) if field.name not in values and _is_required(field)]  # pyright: ignore[reportArgumentType]
    if missing:
        raise ConfigError(f"{where} without {', '.join(missing)}; give {'them' if len(missing) > 1 else 'it'} there")
    return part(**values)


def table_of(part: Any, *leave_out: str) -> dict[str, Any]:
    """The inverse of `read_part`: the fields that differ from their defaults."""
    table = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.name not in leave_out and (_is_required(field) or value != field.default):
            table[field.name] = table_of(value) if dataclasses.is_dataclass(value) else value
    return table


def refuse_unknown(table: str, tree: dict[str, Any], known: Iterable[str]) -> None:
    """Raise ConfigError for a field that is not there, with the ones that are."""
    names = sorted(known)
    for name in tree:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ConfigError(f"unknown field {name!r} in {table}{hint} known: {', '.join(names)}")


def names_of(settings_class: type) -> list[str]:
    """The names of a dataclass's fields."""
    return [field.name for field in dataclasses.fields(settings_class)]


def shown(value: Any, most: int = 80) -> str:
    """A value as an error quotes it."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def describe(annotation: Any) -> str:
    """What an annotation allows, in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(one) for one in inner if one is not type(None))
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"a list of {describe(inner[0])}"
        return f"[{', '.join(describe(one) for one in inner)}]"
    if origin is dict:
        return f"a table of names and {'values' if inner[1] is Any else describe(inner[1])}"
    if dataclasses.is_dataclass(annotation):
        return "a table of settings"
    return _WORDS[annotation]


def _read(value: Any, annotation: Any, where: str) -> Any:
    inner = next((one for one in (annotation, *get_args(annotation)) if dataclasses.is_dataclass(one)), None)
    if isinstance(inner, type) and isinstance(value, dict):
        return read_part(inner, value, where)
    return _fitted(value, annotation, where)


def _fitted(value: Any, annotation: Any, where: str) -> Any:
    try:
        return _fit(value, annotation)
    except _MisfitError:
        raise ConfigError(f"{where}={shown(value)}; it must be {describe(annotation)}") from None


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _fit(value: Any, annotation: Any) -> Any:
    """`value` as the annotation wants it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if origin is Literal:
        return _require(value, isinstance(value, str) and value in inner)
    if origin in (Union, types.UnionType):
        return _first_fit(value, inner)
    if origin is tuple:
        return _fit_tuple(value, inner)
    if origin is dict:
        _require(value, isinstance(value, dict) and all(isinstance(key, str) for key in value))
        return {key: _fit(item, inner[1]) for key, item in value.items()}
    if annotation is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(_require(value, is_number and _is_finite(value)))
    if annotation is int:
        return _require(value, isinstance(value, int) and not isinstance(value, bool))
    return _require(value, isinstance(value, annotation))


def _is_finite(value: float) -> bool:
    """Whether a float can hold it."""
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond 1.8e308
        return False


def _require(value: Any, condition: bool) -> Any:
    if not condition:
        raise _MisfitError
    return value


def _first_fit(value: Any, annotations: tuple[Any, ...]) -> Any:
    for annotation in annotations:
        try:
            return _fit(value, annotation)
        except _MisfitError:
            continue
    raise _MisfitError


def _fit_tuple(value: Any, inner: tuple[Any, ...]) -> tuple[Any, ...]:
    _require(value, isinstance(value, list | tuple))
    if inner[-1] is Ellipsis:
        return tuple(_fit(item, inner[0]) for item in value)
    _require(value, len(value) == len(inner))
    return tuple(_fit(item, annotation) for item, annotation in zip(value, inner, strict=True))
