"""A page about one run, served on this machine's loopback address alone."""

import html
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from moesaic.errors import ConfigError
from moesaic.telemetry.plots import HEAT_BINS, HEAT_OCTAVES, color_bar
from moesaic.telemetry.watching.run import WatchedRun

HOST = "127.0.0.1"
# The page may ask this server and nobody else; nothing of it may be framed.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class WatchServer(ThreadingHTTPServer):
    """Answers / with the page and /state?version=N with JSON. port 0: any that is free.

    Raises ConfigError for a port that is taken or not allowed.
    """

    daemon_threads = True

    def __init__(self, run: WatchedRun, port: int = 0) -> None:
        self.run = run
        self.page = render(run.folder.resolve().name).encode()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot listen on port {port}: {reason}; choose another with --port, or leave it out"
            ) from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle of an answer is no error; others are told as ever."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """The page, or the newest state of the run as JSON."""
        # Another site's name that was made to point here would let that site read the answers.
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        assert isinstance(self.server, WatchServer)
        if host not in (HOST, "localhost"):
            return self._answer(403, "text/plain", b"this page is for its own machine only\n")
        asked = urlsplit(self.path)
        if asked.path == "/":
            return self._answer(200, "text/html; charset=utf-8", self.server.page)
        if asked.path == "/state":
            version = parse_qs(asked.query).get("version", ["-1"])[0]
            known = int(version) if version.isdecimal() else -1
            return self._answer(200, "application/json", json.dumps(self.server.run.state(known)).encode())
        return self._answer(404, "text/plain", b"there is / and /state\n")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the page asks every two seconds."""


def render(name: str) -> str:
    """The page as text; what it shows comes later."""
    page = files("moesaic.telemetry") / "page"
    style = "".join((page / part).read_text(encoding="utf-8") for part in ("colours.css", "page.css", "watch.css"))
    body, script = ((page / part).read_text(encoding="utf-8") for part in ("watch.html", "watch.js"))
    body = body.replace("<!-- scale -->", color_bar())
    settings = json.dumps({"bins": HEAT_BINS, "octaves": HEAT_OCTAVES})
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(name)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}"
        f'<script type="application/json" id="settings">{settings}</script>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )
