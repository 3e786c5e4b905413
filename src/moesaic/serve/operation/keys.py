"""API keys: read from a file or the environment, kept as digests, compared in constant time, never shown."""

import hashlib
import hmac
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from moesaic.errors import ConfigError

VARIABLE = "MOESAIC_API_KEYS"


class _Known(NamedTuple):
    name: str
    digest: bytes


class Keys:
    """The keys that open a server; nothing of it shows them. Without any, every request is let in."""

    def __init__(self, named: Iterable[tuple[str, str]]) -> None:
        self._known = [_Known(name, _digest(key)) for name, key in named]

    def __bool__(self) -> bool:
        return bool(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def name_of(self, key: str) -> str | None:
        """Whose key it is; None: nobody's. It takes as long whichever it is."""
        digest, found = _digest(key), None
        for known in self._known:
            if hmac.compare_digest(digest, known.digest):
                found = known.name
        return found


def read_keys(file: str | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of a file and of MOESAIC_API_KEYS: one a line (or between commas there), `key` or `name:key`.

    Empty lines and what follows a # at a line's start are left out. Raises ConfigError for a file that is not there, is
    empty, or can be read by everybody, and for a name or a key that is there twice.
    """
    lines = [] if file is None else _lines_of(Path(file))
    entries = [(f"line {number} of {file}", line) for number, line in lines]
    entries += [(VARIABLE, word) for word in environment.get(VARIABLE, "").replace("\n", ",").split(",")]
    named: dict[str, str] = {}
    for where, text in entries:
        text = text.strip()
        if text and not text.startswith("#"):
            name, key = _entry(text, where, len(named) + 1)
            if name in named or key in named.values():
                raise ConfigError(f"{where}: the name or the key of {name!r} is there before; give each its own")
            named[name] = key
    if file is not None and not named:
        raise ConfigError(f"{file} has no keys; write one a line, as name:key")
    return Keys(named.items())


def presented(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The key that a request brings: Authorization: Bearer, or x-api-key."""
    for name, value in headers:
        text = value.decode("latin-1").strip()
        if name == b"x-api-key":
            return text
        if name == b"authorization" and text[:7].lower() == "bearer ":
            return text[7:].strip()
    return None


def _entry(text: str, where: str, number: int) -> tuple[str, str]:
    name, colon, key = text.partition(":")
    name, key = (name.strip(), key.strip()) if colon else (f"key-{number}", text)
    if not name or not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where} is no key; write name:key, the key in ASCII without spaces")
    return name, key


def _lines_of(path: Path) -> list[tuple[int, str]]:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the keys of {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the keys of {path} are not UTF-8; write one a line, as name:key") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ConfigError(f"everybody on this machine may read or change {path}; run: chmod 600 {path}")
    return list(enumerate(text.splitlines(), 1))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
