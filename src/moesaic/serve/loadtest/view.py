"""How a load test goes, live: a block on a terminal, a line now and then elsewhere."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, TextIO

from moesaic.serve.loadtest.driving import Progress
from moesaic.serve.loadtest.summary import summarize
from moesaic.telemetry.scale import duration, short

if TYPE_CHECKING:
    from rich.console import RenderableType

EVERY_S = 0.5
LINE_EVERY_S = 15.0
_BARS = " ▁▂▃▄▅▆▇█"
_WINDOWS = 40
_LATELY = 200  # requests whose latencies are shown: summing up all of them would load the machine, too


@contextlib.asynccontextmanager
async def shown(progress: Progress, stream: TextIO = sys.stderr) -> AsyncIterator[None]:
    """Show a test while the block runs."""
    task = asyncio.ensure_future(_live(progress, stream) if stream.isatty() else _lines(progress, stream))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def line_of(progress: Progress) -> str:
    """The state in one line."""
    found = summarize(progress.done)
    errors = f", {sum(found.errors.values())} errors" if found.errors else ""
    first = found.first_token_s.percentiles
    return (
        f"{duration(progress.seconds)}: {found.completed} answered, {progress.running} running{errors}; "
        f"{short(found.output_tokens / max(progress.seconds, 1e-9))} tokens/s; first token p50 "
        f"{_ms(first[50])}, p95 {_ms(first[95])}"
    )


async def _lines(progress: Progress, stream: TextIO) -> None:
    while True:
        await asyncio.sleep(LINE_EVERY_S)
        stream.write(f"{line_of(progress)}\n")
        stream.flush()


async def _live(progress: Progress, stream: TextIO) -> None:
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(file=stream), auto_refresh=False, transient=True) as live:
        while True:
            live.update(block_of(progress), refresh=True)
            await asyncio.sleep(EVERY_S)


def block_of(progress: Progress) -> "RenderableType":
    """The state as a block: counts, speed over time, latencies."""
    from rich.panel import Panel
    from rich.table import Table

    found = summarize(progress.done)
    grid = Table.grid(padding=(0, 2))
    errors = ", ".join(f"{count} × {kind}" for kind, count in found.errors.items()) or "none"
    grid.add_row("requests", f"{found.completed} answered, {progress.running} running, errors: {errors}")
    grid.add_row("tokens/s", f"{_sparkline(progress)} {short(found.output_tokens / max(progress.seconds, 1e-9))}")
    lately = summarize(progress.done[-_LATELY:])
    for name, spread in (("first token", lately.first_token_s), ("between tokens", lately.inter_token_s)):
        at = spread.percentiles
        grid.add_row(name, f"p50 {_ms(at[50])}  p95 {_ms(at[95])}  p99 {_ms(at[99])}")
    return Panel(grid, title=f"load test, {duration(progress.seconds)}", title_align="left", expand=False)


def _sparkline(progress: Progress) -> str:
    """Tokens of answers that ended, over equal parts of the time so far."""
    seconds = max(progress.seconds, 1e-9)
    sums = [0.0] * _WINDOWS
    for asked in progress.done:
        sums[min(_WINDOWS - 1, int(asked.ended_s / seconds * _WINDOWS))] += asked.output_tokens
    most = max(sums) or 1.0
    return "".join(_BARS[round(each / most * (len(_BARS) - 1))] for each in sums)


def _ms(seconds: float) -> str:
    return short(seconds * 1e3, "ms")
