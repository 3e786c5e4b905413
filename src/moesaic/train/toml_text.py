"""Writes a recipe's tree as TOML, which Python's own library only reads."""

import json
import re
from collections.abc import Mapping
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(tree: Mapping[str, Any], comments: Mapping[str, str] | None = None) -> str:
    """The tree as TOML: values first, then a table for every dictionary; None is left out, as TOML has none.

    comments: "table.field" -> what stands beside it.
    """
    comments = comments or {}
    lines = _lines({name: value for name, value in tree.items() if not isinstance(value, Mapping)}, "", comments)
    for name, table in tree.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{_key(name)}]", *_lines(table, f"{name}.", comments)]
    return "\n".join(lines).strip() + "\n"


def _lines(table: Mapping[str, Any], prefix: str, comments: Mapping[str, str]) -> list[str]:
    lines = []
    for name, value in table.items():
        if value is not None:
            comment = comments.get(f"{prefix}{name}", "")
            lines.append(f"{_key(name)} = {_value(value)}" + (f"  # {comment}" if comment else ""))
    return lines


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(name)} = {_value(item)}" for name, item in value.items() if item is not None)
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
