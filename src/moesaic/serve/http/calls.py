"""Calls of tools as templates read them."""

import json
from typing import Any


def call_of(identity: str, name: str, arguments: str | dict[str, Any] | None) -> dict[str, Any]:
    """A call that a message has made. Arguments that are not JSON stay a text: models write such, too, and clients
    send them back. Some clients send the object itself, or nothing where there are none."""
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": _parsed(arguments)}}


def _parsed(arguments: str | dict[str, Any] | None) -> Any:
    if isinstance(arguments, dict):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
