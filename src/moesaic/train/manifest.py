"""SHA256SUMS: what every file of a folder must be, as `sha256sum --check SHA256SUMS` reads it too."""

import hashlib
import re
from pathlib import Path

MANIFEST = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n/]+)\n")


def write_manifest(folder: Path) -> None:
    """List every file of the folder with its SHA-256. Written last, it says that the folder is complete."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    (folder / MANIFEST).write_text("".join(f"{_digest(file)}  {file.name}\n" for file in files), encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with the first file that is not as it was written, in words; None when all are.

    A file that is not listed counts too: what reads the folder might take it for one of its own.
    """
    try:
        text = (folder / MANIFEST).read_bytes().decode()
    except FileNotFoundError:
        return f"{folder / MANIFEST} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"{folder / MANIFEST} is damaged ({error})"
    entries = [_LINE.fullmatch(line) for line in text.splitlines(keepends=True)]
    for number, entry in enumerate(entries, 1):
        if entry is None:
            return f"{folder / MANIFEST} is damaged (line {number})"
        file = folder / entry[2]
        try:
            digest = _digest(file)
        except FileNotFoundError:
            return f"{file} is missing, and {MANIFEST} lists it"
        except (OSError, ValueError) as error:
            return f"{file} cannot be read ({error})"
        if digest != entry[1]:
            return f"{file} is damaged (it does not match {MANIFEST})"
    if not entries:
        return f"{folder / MANIFEST} is empty"
    listed = {entry[2] for entry in entries if entry} | {MANIFEST}
    others = sorted(path.name for path in folder.iterdir() if path.name not in listed)
    return f"{folder / others[0]} is there, and {MANIFEST} does not list it" if others else None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
