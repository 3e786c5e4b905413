"""What no client should send, by our own OpenAPI document and byte by byte below it, and what a server does with it."""

import json
import random
import select
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.error import HTTPError
from urllib.parse import urlsplit

ANSWER_S = 60.0
MODEL = "model"
ENDLESS = ("/v1/routing/stream",)  # events until the client leaves
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize", "/v1/embeddings")
_WORDS = (
    "prompt",
    "messages",
    "input",
    "max_tokens",
    "temperature",
    "n",
    "stop",
    "logit_bias",
    "stream",
    "seed",
    "tools",
)


@dataclass
class Findings:
    """sent: how many of each kind. statuses: how often each was answered ("closed": nothing was). wrong: what should
    not have been, by its cause.
    """

    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, status: str, kind: str, what: str = "") -> None:
        """An answer. A server never fails at what a client sends, and never leaves it without an end."""
        with self._lock:
            self.sent[kind] += 1
            self.statuses[status] += 1
            if status.startswith("5") or status == "hangs":
                self.wrong[f"{status} for {what or kind}"] += 1


def schema_cases(url: str, count: int, seed: int, findings: Findings) -> None:
    """About `count` requests by the document's schemas, half of them as they should be, half not."""
    import hypothesis
    import hypothesis.errors
    import schemathesis
    from schemathesis.core.result import Ok

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    modes = schemathesis.GenerationMode
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    operations = [operation for operation in operations if operation.path not in ENDLESS]
    assert operations, "the document has no operation"
    each = max(1, count // (2 * len(operations)))
    quiet = [
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.filter_too_much,
        hypothesis.HealthCheck.data_too_large,
    ]
    for operation in operations:
        for mode in (modes.POSITIVE, modes.NEGATIVE):

            @hypothesis.seed(seed)
            @hypothesis.settings(max_examples=each, deadline=None, database=None, suppress_health_check=quiet)
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case, mode: schemathesis.GenerationMode = mode) -> None:
                if mode is modes.POSITIVE and isinstance(case.body, dict) and "model" in case.body:
                    case.body["model"] = MODEL  # no schema says which there are
                answer = case.call(timeout=ANSWER_S)
                what = f"{case.method} {case.path}: {str(case.body)[:200]}"
                findings.add(str(answer.status_code), f"{mode.value} by the schema", what)

            try:
                ask()
            except hypothesis.errors.Unsatisfiable:  # nothing can be wrong with what takes nothing
                continue


def raw_cases(url: str, count: int, seed: int, findings: Findings, threads: int = 8) -> None:
    """`count` requests of every kind in `KINDS`, from several threads."""

    def ask_some(first: int) -> None:
        for number in range(first, count, threads):
            draw = random.Random(f"{seed} {number}")
            make = KINDS[number % len(KINDS)]
            findings.add(exchange(url, *make(draw)), make.__name__)

    asking = [threading.Thread(target=ask_some, args=(first,)) for first in range(threads)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()


def slow_clients(url: str, count: int, findings: Findings) -> None:
    """Clients that hold connections open, all at once, until the server ends them: with half a head, with half a body,
    and every third with a byte now and then."""
    place = _place(url)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
    begun = (head, head + b"content-length: 100\r\n\r\n{", head + b"x-slow: ")
    clients = [socket.create_connection(place, timeout=ANSWER_S) for _ in range(count)]
    for number, client in enumerate(clients):
        client.sendall(begun[number % len(begun)])
    _drip(clients[len(begun) - 1 :: len(begun)])
    for client in clients:
        findings.add(_status(client), "slow clients")
        client.close()


def _drip(clients: Sequence[socket.socket]) -> None:
    """A byte at a time, until the server answers each."""
    waiting, until = set(clients), time.monotonic() + ANSWER_S
    while waiting and time.monotonic() < until:
        answered, _, _ = select.select(waiting, [], [], 0.1)
        waiting -= set(answered)
        for client in waiting:
            with suppress(OSError):
                client.sendall(b"x")


def good_text(url: str, model: str, prompt: str = "the quick brown fox") -> str:
    """What a good request is answered. Raises OSError for one that is not."""
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return json.load(answer)["choices"][0]["text"]
    except HTTPError as error:
        raise OSError(f"a good request is answered {error.code}: {error.read()[:500]!r}") from error


def exchange(url: str, sent: bytes, leaves: bool) -> str:
    """Send bytes on a connection of their own; the status of the answer. leaves: before there can be one."""
    try:
        with socket.create_connection(_place(url), timeout=ANSWER_S) as client:
            client.sendall(sent)
            if leaves:
                return "left"
            client.shutdown(socket.SHUT_WR)
            return _status(client)
    except TimeoutError:
        return "hangs"
    except OSError:
        return "closed"


Sent = tuple[bytes, bool]


def truncated(draw: random.Random) -> Sent:
    """A body that ends too soon, as its length says or not."""
    body = _body(draw)
    cut = body[: draw.randrange(len(body))]
    return _post(draw, cut, length=len(draw.choice((cut, body)))), False


def flipped(draw: random.Random) -> Sent:
    """A body with bytes changed, taken out or put in."""
    body = bytearray(_body(draw))
    for _ in range(draw.randint(1, 8)):
        at, width = draw.randrange(len(body)), draw.randint(0, 2)
        body[at : at + width] = draw.randbytes(draw.randint(0, 2)) or b"{"
    return _post(draw, bytes(body)), False


def deep(draw: random.Random) -> Sent:
    """JSON within JSON, closed or not."""
    depth = draw.choice((10, 100, 1000, 20_000, 200_000))
    opening, closing = draw.choice((("[", "]"), ('{"a":', "}")))
    inner = opening * depth + "1" + closing * (depth if draw.random() < 0.5 else 0)
    return _post(draw, f'{{"model": "model", "prompt": "a", "{draw.choice(_WORDS)}": {inner}}}'.encode()), False


def huge_numbers(draw: random.Random) -> Sent:
    """Numbers that few types hold."""
    numbers = (
        "9" * 5000,
        "-" + "9" * 30,
        "1e999",
        "-1e999",
        "1e-999",
        "NaN",
        "Infinity",
        "-0",
        "0." + "1" * 4000,
        "2147483648",
    )
    body = json.loads(_body(draw))
    text = json.dumps(body)[:-1] + f', "{draw.choice(_WORDS)}": {draw.choice(numbers)}}}'
    return _post(draw, text.encode()), False


def broken_utf8(draw: random.Random) -> Sent:
    """Bytes that are no characters, and characters that no tokenizer expects."""
    bad = draw.choice(
        (b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\x00", b"\\ud800", b"\\u0000", "\U0010ffff".encode(), b"\xf8\x88")
    )
    return _post(draw, b'{"model": "model", "max_tokens": 2, "prompt": "' + bad * draw.randint(1, 50) + b'"}'), False


def strange_heads(draw: random.Random) -> Sent:
    """Heads that are no HTTP, or a bad one."""
    body = _body(draw)
    length = f"content-length: {len(body)}\r\n"
    heads = (
        f"POST /v1/completions HTTP/1.1\r\n{length}{length}\r\n",
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{length}content-length: 5\r\n\r\n",
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{length}transfer-encoding: chunked\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        f"POST /v1/completions HTTP/9.9\r\nhost: localhost\r\n{length}\r\n",
        f"BREW /v1/completions HTTP/1.1\r\nhost: localhost\r\n{length}\r\n",
        f"POST /%00%ff/{'a' * draw.choice((10, 70_000))} HTTP/1.1\r\nhost: localhost\r\n{length}\r\n",
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{'x: y' * 9000}\r\n{length}\r\n",
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: {'é' * 9}\r\n{length}\r\n",
        "\x16\x03\x01\x02\x00\x01",
        "\r\n\r\n\r\n",
    )
    return draw.choice(heads).encode() + body, False


def vanishing(draw: random.Random) -> Sent:
    """A good request whose client leaves."""
    body = {"model": "model", "prompt": "a", "max_tokens": 16, "stream": draw.random() < 0.5}
    return _post(draw, json.dumps(body).encode()), True


KINDS: Sequence[Callable[[random.Random], Sent]] = (
    truncated, flipped, deep, huge_numbers, broken_utf8, strange_heads, vanishing,
)  # fmt: skip


def _body(draw: random.Random) -> bytes:
    body = {
        "model": draw.choice(("model", "model", "", "x" * 1000)),
        "prompt": draw.choice(("a", ["a", "b"], [1, 2], [[1], [2]], "", [], {"a": 1}, None, "é" * 100)),
        "messages": draw.choice(([{"role": "user", "content": "a"}], [], "a", [{}], [{"role": "x", "content": [1]}])),
        "max_tokens": draw.choice((1, 4, 0, -1, 10**9, "4", None, 1.5)),
        "temperature": draw.choice((0, 1, -1, 1e9, "hot", None)),
        "stop": draw.choice((None, "a", ["a"] * 100, [""], 5)),
        "n": draw.choice((1, 2, 0, 10**6, None)),
        "stream": draw.choice((True, False, "yes", None)),
        "response_format": draw.choice((None, {"type": "json_object"}, {"type": "x"}, {"type": "json_schema"})),
    }
    kept = draw.sample(sorted(body), draw.randint(2, len(body)))
    return json.dumps({"model": "model", **{name: body[name] for name in kept}}).encode()


def _post(draw: random.Random, body: bytes, length: int | None = None) -> bytes:
    head = f"POST {draw.choice(PATHS)} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    size = len(body) if length is None else length
    return f"{head}content-length: {size}\r\nconnection: close\r\n\r\n".encode() + body


def _status(client: socket.socket) -> str:
    """Read an answer to its end."""
    try:
        found = b""
        while part := client.recv(65536):
            found = found or part[:16]
    except TimeoutError:
        return "hangs"
    except OSError:
        return "closed"
    return found[9:12].decode("ascii", "replace") if found.startswith(b"HTTP/1.") else "closed"


def _place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    return parts.hostname, parts.port
