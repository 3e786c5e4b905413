"""`moesaic watch`: a page on this machine that follows a run from its files."""

import argparse
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli import output
from moesaic.errors import ConfigError

if TYPE_CHECKING:
    from moesaic.telemetry.watching.server import WatchServer

_CHILD = "import sys; from moesaic.cli.watch import follow_parent; follow_parent(sys.argv[1], sys.argv[2] == 'browser')"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic watch`."""
    parser.epilog = (
        "example: moesaic watch runs/first\n"
        "example: moesaic watch /mnt/other-machine/runs/first  # any folder that this machine sees\n"
        "example: moesaic watch runs/first --json  # where it stands, once"
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder that `moesaic train --out` writes")
    parser.add_argument(
        "--port", metavar="N", type=int, default=0, help="serve the page on this port of 127.0.0.1 (any that is free)"
    )
    parser.add_argument("--no-browser", action="store_true", help="only say where the page is")
    parser.add_argument("--json", action="store_true", help="print where the run stands, with its curves, and leave")


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C. Returns the exit code."""
    from moesaic.telemetry.watching.run import WatchedRun

    watched = WatchedRun(args.run)
    if args.json:
        output.print_json(watched.state())
        return 0
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port}; give 1024 to 65535, or leave it out")
    with _served(args.run, args.port) as server:
        _say(server, not args.no_browser)
        output.talk("Ctrl-C ends the page; the run goes on")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            output.next_command(f"moesaic inspect {args.run}")
    return 0


@contextmanager
def watched_by_page(folder: Path, browser: bool) -> Iterator[None]:
    """Show a run's page while the block runs, from a process of its own, so that training does not wait for it."""
    command = [sys.executable, "-c", _CHILD, str(folder), "browser" if browser else "none"]
    # In a session of its own, so that Ctrl-C reaches the training alone; it ends when its stdin does.
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(10)


def follow_parent(folder: str, browser: bool) -> None:
    """Serve the page until stdin ends, as it does when the process that started this one is gone, however it went."""
    with _served(Path(folder), 0) as server:
        _say(server, browser)
        threading.Thread(target=_end_with_stdin, args=(server,), daemon=True).start()
        server.serve_forever(poll_interval=0.2)


def _end_with_stdin(server: "WatchServer") -> None:
    sys.stdin.read()
    server.shutdown()


@contextmanager
def _served(folder: Path, port: int) -> Iterator["WatchServer"]:
    from moesaic.telemetry.watching.run import WatchedRun
    from moesaic.telemetry.watching.server import WatchServer

    server = WatchServer(WatchedRun(folder), port)
    try:
        yield server
    finally:
        server.server_close()


def _say(server: "WatchServer", browser: bool) -> None:
    output.talk(f"watching {server.run.folder} at {server.url}")
    # In a thread: some systems' way of opening a browser waits for it to be closed.
    if browser:
        threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
