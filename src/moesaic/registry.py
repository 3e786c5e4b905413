"""Name -> thing. An unknown name is answered with the known ones."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from moesaic.errors import ConfigError

T = TypeVar("T")


def unknown_name(what: str, name: str, known: list[str]) -> ConfigError:
    """The error for a name that nothing is registered under: says what was meant, or what there is."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ConfigError(f"unknown {what} {name!r}{hint} Known: {', '.join(known)}")


class Registry(Mapping[str, T]):
    """A mapping that things enter by decoration and that explains itself when asked for an unknown name."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a function or class to make it known under `name`."""

        def enter(thing: T) -> T:
            if name in self._things:
                raise ValueError(f"{self.what} {name!r} is registered twice")
            self._things[name] = thing
            return thing

        return enter

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            raise unknown_name(self.what, name, sorted(self._things))
        return self._things[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would ask by __getitem__, which explains instead
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)
