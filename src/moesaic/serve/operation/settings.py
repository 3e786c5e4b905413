"""How a server is run: the tables of serve.toml, checked once."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moesaic.errors import ConfigError
from moesaic.fields import read_part, settle

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """One model, and how it runs.

    path: what `Engine` takes. bits, experts_bits, values, dtype, threads, max_length, cache_format: the engine's.
    cache: room for texts and for prefixes, taken at once: tokens (a number) or bytes ("4GiB"). max_running: requests in
    one step.
    step_tokens: of all requests together in one step. share_prefixes, verify_hits: see `LoopSettings`. speculation:
    who drafts tokens: the text itself, the model's layers that predict further tokens, or `draft`, another model.
    embeddings: what /v1/embeddings gives: the mean of the hidden states, that of the last token, or an error.
    at_start: load it when the server starts; else when a client says so (see `load_models`).
    """

    path: str
    bits: int | None = None
    experts_bits: int | None = None
    values: Literal["even", "uneven"] = "even"
    dtype: Literal["fp32", "bf16"] | None = None
    threads: int | None = None
    max_length: int | None = None
    cache: int | str = 65_536
    cache_format: Literal["fp32", "bf16", "int8"] | None = None
    max_running: int = 32
    step_tokens: int = 256
    share_prefixes: bool = True
    verify_hits: float = 0.0
    speculation: Literal["off", "ngram", "mtp", "draft"] = "ngram"
    draft: str | None = None
    embeddings: Literal["off", "mean", "last"] = "off"
    at_start: bool = True

    def __post_init__(self) -> None:
        settle(self, "models")
        for name in ("bits", "experts_bits"):
            if getattr(self, name) not in (None, 4, 8):
                raise ConfigError(f"{name}={getattr(self, name)}; use 4 or 8, or leave it out")
        if self.experts_bits is not None and self.bits is None:
            raise ConfigError("experts_bits without bits, which says how many the other weights get; give both")
        if self.values == "uneven" and 4 not in (self.bits, self.experts_bits):
            raise ConfigError('values="uneven" without bits=4, which they are for; give both')
        if (self.draft is None) == (self.speculation == "draft"):
            raise ConfigError('speculation="draft" and draft=PATH need each other; give both, or neither')
        _require_positive(self, "threads", "max_length", "max_running", "step_tokens")
        if isinstance(self.cache, str):
            parse_bytes("cache", self.cache)
        elif self.cache < 1:
            raise ConfigError(f'cache={self.cache}; give tokens, or bytes such as "4GiB"')


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask, and how slowly.

    body_bytes: of a request. header_s, body_s: until headers and body must have come. stall_s: how long a client may
    leave an answer unread. keep_alive_s: how long a connection may be idle. queue: requests that wait for their turn.
    prompt_tokens, new_tokens: None: as many as the model takes. choices: `n`, and prompts times n.
    requests_per_minute: of one key, or of one address where there are no keys; None: any number. timeout_s: of a
    request, after which it ends as it stands.
    """

    body_bytes: int = 8 * 2**20
    header_bytes: int = 32 * 2**10
    header_s: float = 10.0
    body_s: float = 30.0
    stall_s: float = 60.0
    keep_alive_s: float = 30.0
    connections: int = 1000
    queue: int = 256
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    choices: int = 128
    requests_per_minute: int | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        settle(self, "limits")
        _require_positive(self, *(name for name in vars(self) if name != "queue"))
        if self.queue < 0:
            raise ConfigError(f"limits.queue={self.queue}; use 0 or more")


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """format: of a request's line: "text" for people, "json" for programs, "none". prompts: texts are written, too."""

    format: Literal["text", "json", "none"] = "text"
    prompts: bool = False

    def __post_init__(self) -> None:
        settle(self, "log")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """A whole server.

    models: by the name that clients use. api_key_file: see `keys.read_keys`. cors_origins: sites whose pages may ask.
    allowed_hosts: names by which it may be asked; empty: those of this machine where it listens on loopback alone and
    has no keys, else any. metrics_key: /metrics needs a key. load_models: clients may load and unload models.
    drain_seconds: how long running requests may take to finish after SIGTERM.
    """

    models: dict[str, ModelSettings] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | None = None
    metrics_key: bool = False
    load_models: bool = False
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    drain_seconds: float = 30.0
    limits: Limits = field(default_factory=Limits)
    log: LogSettings = field(default_factory=LogSettings)

    def __post_init__(self) -> None:
        settle(self, "serve")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port}; use 1 to 65535, or 0 for any that is free")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("TLS needs both tls_cert and tls_key; give both, or neither")
        if self.drain_seconds < 0:
            raise ConfigError(f"drain_seconds={self.drain_seconds}; use 0 or more")
        for name in ("tls_cert", "tls_key"):
            value = getattr(self, name)
            if value is not None and not Path(value).is_file():
                raise ConfigError(f"{name}={value}; there is no such file")


def settings_of(tree: dict[str, Any]) -> ServeSettings:
    """Settings from the tables of a file. Raises ConfigError for what is unknown or impossible, by its name."""
    tables = dict(tree)
    models = tables.pop("models", {})
    if not isinstance(models, dict):
        raise ConfigError("models must be tables: [models.NAME] with path = ...")
    named = {name: read_part(ModelSettings, table, f"models.{name}") for name, table in models.items()}
    return read_part(ServeSettings, tables, "serve", models=named)


def parse_bytes(name: str, text: str) -> int:
    """Bytes of "500MB" or "4GiB". Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", text.strip().upper())
    if not found or found[2] not in _UNITS or not float(found[1]):
        raise ConfigError(f'{name}={text!r}; give bytes such as "500MB" or "4GiB"')
    return int(float(found[1]) * _UNITS[found[2]])


def _require_positive(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name}={value}; use more than 0")
