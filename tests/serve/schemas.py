"""JSON schemas of many kinds, made by numbers: the same number gives the same schema."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
_NAMES = ["name", "id", "tags", "größe", "is_ok", "a b", "x", "value", "kind", "next"]


def schema(number: int) -> Schema:
    """Draft 2020-12, of what llguidance can do. Small where it can be, so that random text comes to an end."""
    choose = random.Random(number)
    kinds = [_object, _array, _reference, _any_of, _recursive]
    made = kinds[number % len(kinds)](choose, 3)
    if number % 4:
        return made
    parts = {"$defs": made.pop("$defs")} if "$defs" in made else {}
    return {"type": "object", "properties": {"it": made}, "required": ["it"], **_closed(choose), **parts}


def _any(choose: random.Random, depth: int) -> Schema:
    leaves: list[Callable[[random.Random, int], Schema]] = [
        _string,
        _pattern,
        _format,
        _integer,
        _number,
        _enum,
        _const,
        _plain,
    ]
    nested: list[Callable[[random.Random, int], Schema]] = [_object, _array, _tuple, _any_of, _all_of, _map]
    return choose.choice(leaves if depth <= 0 or choose.random() < 0.5 else nested)(choose, depth - 1)


def _closed(choose: random.Random) -> Schema:
    return {"additionalProperties": False} if choose.random() < 0.8 else {}


def _object(choose: random.Random, depth: int) -> Schema:
    names = choose.sample(_NAMES, choose.randint(1, 4))
    required = [name for name in names if choose.random() < 0.6]
    properties = {name: _any(choose, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _map(choose: random.Random, depth: int) -> Schema:
    return {"type": "object", "additionalProperties": _any(choose, depth - 1), "maxProperties": 2} | (
        {"patternProperties": {"^x-[a-z]{1,3}$": {"type": "integer"}}} if choose.random() < 0.3 else {}
    )


def _array(choose: random.Random, depth: int) -> Schema:
    least = choose.randint(0, 2)
    return {
        "type": "array",
        "items": _any(choose, depth - 1),
        "minItems": least,
        "maxItems": least + choose.randint(0, 2),
    }


def _tuple(choose: random.Random, depth: int) -> Schema:
    items = [_any(choose, depth - 1) for _ in range(choose.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _any_of(choose: random.Random, depth: int) -> Schema:
    return {choose.choice(["anyOf", "anyOf", "oneOf"]): [{"type": "null"}, _object(choose, depth - 1)]}


def _all_of(choose: random.Random, depth: int) -> Schema:
    return {"allOf": [{"type": "integer", "minimum": choose.randint(-9, 3)}, {"maximum": choose.randint(10, 2000)}]}


def _reference(choose: random.Random, depth: int) -> Schema:
    return {
        "$defs": {"part": _any(choose, depth - 1)},
        "type": "object",
        "properties": {"one": {"$ref": "#/$defs/part"}, "two": {"$ref": "#/$defs/part"}},
        "required": ["one"],
        "additionalProperties": False,
    }


def _recursive(choose: random.Random, depth: int) -> Schema:
    tree = {
        "type": "object",
        "properties": {
            "value": _string(choose, 0),
            "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
        },
        "required": ["value"],
        "additionalProperties": False,
    }
    return {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"}


def _string(choose: random.Random, depth: int) -> Schema:
    least = choose.randint(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + choose.randint(0, 6)}


def _pattern(choose: random.Random, depth: int) -> Schema:
    return {
        "type": "string",
        "pattern": choose.choice(
            [r"^[A-Z]{2}-\d{3}$", "^(yes|no|maybe)$", r"^[a-f0-9]{4,8}$", r"^\+?\d{3,6}$", "^a+b?$"]
        ),
    }


def _format(choose: random.Random, depth: int) -> Schema:
    return {"type": "string", "format": choose.choice(["date", "date-time", "time", "ipv4", "uuid", "email"])}


def _integer(choose: random.Random, depth: int) -> Schema:
    least = choose.randint(-500, 500)
    return choose.choice(
        [
            {"type": "integer", "minimum": least, "maximum": least + choose.randint(0, 3000)},
            {"type": "integer", "exclusiveMinimum": least, "exclusiveMaximum": least + 9},
            {"type": "integer", "multipleOf": choose.randint(2, 9), "minimum": 0, "maximum": 500},
        ]
    )


def _number(choose: random.Random, depth: int) -> Schema:
    least = choose.randint(-50, 50) / 4
    return {"type": "number", "minimum": least, "maximum": least + choose.randint(1, 400) / 8}


def _enum(choose: random.Random, depth: int) -> Schema:
    return {"enum": choose.sample([1, 2.5, "red", "grün", None, True, ["a"], {"k": 1}, 'a "quoted" one'], 3)}


def _const(choose: random.Random, depth: int) -> Schema:
    return {"const": choose.choice([0, "fixed", [1, 2], {"a": {"b": None}}, False])}


def _plain(choose: random.Random, depth: int) -> Schema:
    return {"type": choose.choice(["boolean", "null", ["boolean", "null"]])}
