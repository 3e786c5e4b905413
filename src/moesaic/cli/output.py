"""What the commands print: data to stdout, talk to stderr, colour and boxes only on a terminal."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

_CONTROL = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def write(text: str, stream: TextIO | None = None) -> None:
    """Write text to stdout (or `stream`) at once, whatever its encoding.

    Characters that the stream cannot show are replaced; on a terminal control characters too, since text that a
    model wrote must not move the cursor or rename the window.
    """
    target = sys.stdout if stream is None else stream
    if target.isatty():
        text = text.translate(_CONTROL)
    encoding = target.encoding or "utf-8"
    target.write(text.encode(encoding, "replace").decode(encoding))
    target.flush()


def talk(line: str) -> None:
    """One line to the person at the keyboard: stderr, never mixed with data."""
    write(f"{line}\n", sys.stderr)


def next_command(line: str) -> None:
    """The last line of a command: what one would type next."""
    talk(f"next: {line}")


def print_json(document: dict[str, Any]) -> None:
    """One JSON document to stdout, ASCII only, so that every terminal and pipe carries it."""
    write(json.dumps(document, indent=2) + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table to stdout: through rich on a terminal, aligned plain text elsewhere. Columns of numbers stand right."""
    if sys.stdout.isatty():
        _rich_table(columns, rows, title)
    else:
        write(plain_table(columns, rows, title))


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """The table as plain text, two spaces between columns."""
    lines = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    right = [_is_numeric(rows, i) for i in range(len(columns))]
    text = f"{title}\n" if title else ""
    for line in lines:
        cells = (
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(line, widths, right, strict=True)
        )
        text += "  ".join(cells).rstrip() + "\n"
    return text


def number(count: float) -> str:
    """A count for people, three digits: 512, 1.54K, 135M, 46.7B."""
    return _scaled(count, ("", "K", "M", "B", "T", "e15"), "")


def size(num_bytes: float) -> str:
    """Bytes for people, decimal units as disks have them: 512 B, 1.2 GB."""
    return _scaled(num_bytes, ("B", "kB", "MB", "GB", "TB", "PB"), " ")


def duration(seconds: float) -> str:
    """Time for people: 0.42 s, 7.5 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 0.01:
        return "<0.01 s"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show on stderr how far a long step is; yields `advance(steps=1, note="")`.

    A live bar on a terminal; elsewhere one line when it ends. Without `total` the bar only says that work goes on.
    """
    if sys.stderr.isatty():
        with _rich_progress(what, total) as advance:
            yield advance
        return
    start_s, notes = time.perf_counter(), [""]
    yield lambda steps=1, note="": notes.append(note)
    note = f", {notes[-1]}" if notes[-1] else ""
    talk(f"{what}: {duration(time.perf_counter() - start_s)}{note}")


def _scaled(value: float, units: tuple[str, ...], space: str) -> str:
    power = 0
    while abs(value) >= 999.5 and power + 1 < len(units):
        value, power = value / 1000, power + 1
    digits = f"{value:#.3g}".rstrip(".") if power and abs(value) < 999.5 else f"{value:.0f}"
    return f"{digits}{space}{units[power]}" if units[power] else digits


def _is_numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    cells = [row[column] for row in rows if row[column] not in ("", "-")]
    return bool(cells) and all(cell.lstrip("+-~<")[:1].isdigit() for cell in cells)


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title or None, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        grid.add_column(column, justify="right" if _is_numeric(rows, i) else "left")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    Console().print(grid)


@contextmanager
def _rich_progress(what: str, total: int | None) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*parts, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, note="")
        yield lambda steps=1, note="": bar.update(task, advance=steps, note=note)
