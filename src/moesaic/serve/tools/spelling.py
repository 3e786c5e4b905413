"""How calls are written, for grammars that make a model write one."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moesaic.serve.tools.parts import Tool


class Json(NamedTuple):
    """A place where JSON of a schema stands."""

    schema: Mapping[str, Any] | bool


class Words(NamedTuple):
    """A place where any words stand without the character `<`, with which the next mark begins."""


class Maybe(NamedTuple):
    """What may be left out."""

    pieces: Sequence["Piece"]


Piece = str | Json | Words | Maybe
Spelled = Callable[[Tool], Sequence[Piece]]


def json_call(opening: str, closing: str, arguments: str = "arguments") -> Spelled:
    """{"name": ..., "arguments": {...}} between marks."""

    def spelled(tool: Tool) -> Sequence[Piece]:
        name = json.dumps(tool.name)
        return (f'{opening}{{"name": {name}, "{arguments}": ', Json(tool.parameters), f"}}{closing}")

    return spelled


def named_call(opening: str, separator: str, closing: str) -> Spelled:
    """A name and its arguments, with marks before, between and behind them."""
    return lambda tool: (f"{opening}{tool.name}{separator}", Json(tool.parameters), closing)


def argument_call(call: str, argument: Callable[[str, bool], str], argument_end: str, closing: str) -> Spelled:
    """Arguments one after another, in the order of the schema. argument: what stands before one, by its name and
    whether it is a text.
    """

    def spelled(tool: Tool) -> Sequence[Piece]:
        found: list[Piece] = [call.replace("NAME", tool.name)]
        for name, schema in tool.parameters.get("properties", {}).items():
            is_text = isinstance(schema, Mapping) and schema.get("type") == "string" and "enum" not in schema
            pieces = (argument(name, is_text), Words() if is_text else Json(schema), argument_end)
            found += pieces if name in tool.parameters.get("required", ()) else (Maybe(pieces),)
        return [*found, closing]

    return spelled
