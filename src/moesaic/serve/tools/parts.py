"""What an answer is made of, in the order in which it is written."""

from collections.abc import Generator, Mapping
from typing import Any, NamedTuple


class Said(NamedTuple):
    """Words for the user."""

    text: str


class Thought(NamedTuple):
    """Words that the model says to itself."""

    text: str


class CallBegun(NamedTuple):
    """A tool is called; its arguments follow. id: where the text names one."""

    name: str
    id: str | None = None


class CallArguments(NamedTuple):
    """More of the JSON text of the arguments of the newest call."""

    text: str


Part = Said | Thought | CallBegun | CallArguments

# Parsers are generators: they yield parts, and None when they have to wait for more text.
Parts = Generator[Part | None, None, None]


class Tool(NamedTuple):
    """A function that may be called. parameters: a JSON schema of an object."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As templates get it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}
