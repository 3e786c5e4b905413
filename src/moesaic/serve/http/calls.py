"""Calls of tools as templates read them."""

import json
from typing import Any


def call_of(identity: str, name: str, arguments: str) -> dict[str, Any]:
    """A call that a message has made. Arguments that are not JSON stay a text: models write such, too, and clients
    send them back."""
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": _parsed(arguments)}}


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
