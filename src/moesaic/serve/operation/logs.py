"""One line for each request, on stderr: for people or for programs. Never keys; texts only where that is asked for."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from moesaic.serve.operation.observing import Exchange
from moesaic.serve.operation.settings import LogSettings

_QUIET = frozenset({"/health", "/ready", "/metrics"})


class RequestLog:
    """Writes the lines. Probes of /health, /ready and /metrics are left out: they come every few seconds."""

    def __init__(self, settings: LogSettings, stream: TextIO | None = None) -> None:
        self.settings, self.stream = settings, stream or sys.stderr

    def hear(self, exchange: Exchange) -> None:
        if self.settings.format == "none" or (exchange.route in _QUIET and exchange.status in (200, 503)):
            return
        entry = entry_of(exchange, prompts=self.settings.prompts)
        line = json.dumps(entry) if self.settings.format == "json" else text_of(entry)
        self.stream.write(f"{line}\n")
        self.stream.flush()


def set_up_logging(settings: LogSettings) -> None:
    """Have what goes wrong inside the server written in the same form, but not what is wrong with clients' bytes."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if settings.format == "json" else logging.Formatter("%(levelname)s %(message)s"))
    for name, level in (("moesaic", logging.WARNING), ("uvicorn.error", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One line, a traceback within it."""
        entry = {"time": _now(), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def entry_of(exchange: Exchange, *, prompts: bool) -> dict[str, Any]:
    """What a line says; what there was none of is left out."""
    notes = exchange.notes
    first = notes.first_token_at
    entry: dict[str, Any] = {
        "time": _now(),
        "id": notes.request_id,
        "method": exchange.method,
        "route": exchange.route,
        "status": exchange.status,
        "seconds": round(exchange.seconds, 4),
        "model": notes.model,
        "key": exchange.key_name,
        "client": exchange.client,
    }
    if notes.prompt_tokens:
        entry |= {
            "prompt_tokens": notes.prompt_tokens,
            "cached_tokens": notes.cached_tokens,
            "completion_tokens": notes.completion_tokens,
            "first_token_seconds": None if first is None else round(first - notes.started_at, 4),
            "finish": notes.finish,
        }
    if prompts and notes.prompts:
        entry |= {"prompts": notes.prompts, "texts": notes.texts}
    return {name: value for name, value in entry.items() if value is not None}


def text_of(entry: dict[str, Any]) -> str:
    """A line for people."""
    parts = [entry["time"][11:19], str(entry["status"]), entry["method"], entry["route"], f"{entry['seconds']:.3f}s"]
    if "model" in entry:
        parts.append(entry["model"])
    if "prompt_tokens" in entry:
        parts.append(f"{entry['prompt_tokens']}+{entry['completion_tokens']} tokens")
        if entry["cached_tokens"]:
            parts.append(f"{entry['cached_tokens']} cached")
    if "first_token_seconds" in entry:
        parts.append(f"first {entry['first_token_seconds']:.3f}s")
    parts += [str(entry[name]) for name in ("finish", "key") if name in entry]
    parts.append(entry["id"])
    if "prompts" in entry:
        parts.append(json.dumps({"prompts": entry["prompts"], "texts": entry["texts"]}, ensure_ascii=True))
    return " ".join(parts)
