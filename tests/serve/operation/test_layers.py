"""The layers before the routes, each alone."""

import asyncio
import gc
import weakref

import pytest
from starlette.types import Message, Receive, Scope, Send

from moesaic.serve.operation.access import LOOPBACK_NAMES, RequireHost, RequireKey
from moesaic.serve.operation.body import LimitBody
from moesaic.serve.operation.drain import Readiness, TakeNothingNew
from moesaic.serve.operation.keys import Keys
from moesaic.serve.operation.observing import Exchange, Observe
from moesaic.serve.operation.rates import LimitRate
from moesaic.serve.operation.settings import Limits
from tests.serve.operation.asgi import Answer, ask, echo, scope_of

KEYS = Keys([("alice", "sk-a"), ("bob", "sk-b")])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("authorization", "Bearer sk-a")], 200),
        ([("x-api-key", "sk-b")], 200),
        ([("authorization", "Bearer sk-")], 401),
        ([], 401),
    ],
    ids=["bearer", "x-api-key", "unknown", "none"],
)
def test_keys_open_the_door(headers: list[tuple[str, str]], status: int) -> None:
    answer = asyncio.run(ask(RequireKey(echo, KEYS), scope_of(headers=headers)))
    assert answer.status == status
    if status == 401:
        assert answer.json["error"]["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer" and "sk-" not in answer.json["error"]["message"]


def test_refusals_have_the_shape_of_their_protocol() -> None:
    answer = asyncio.run(ask(RequireKey(echo, KEYS), scope_of("/v1/messages")))
    assert (answer.json["type"], answer.json["error"]["type"]) == ("error", "authentication_error")


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/page/app.js"])
def test_some_doors_are_open(path: str) -> None:
    assert asyncio.run(ask(RequireKey(echo, KEYS), scope_of(path, "GET"))).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:80", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("evil.example:8000", 403), ("", 403)],
)
def test_only_names_of_this_machine(host: str, status: int) -> None:
    answer = asyncio.run(ask(RequireHost(echo, LOOPBACK_NAMES), scope_of(headers=[("host", host)])))
    assert answer.status == status


def test_probes_of_http_1_0_bring_no_name() -> None:
    assert asyncio.run(ask(RequireHost(echo, LOOPBACK_NAMES), scope_of(headers=[]))).status == 200


def limited(parts: list[bytes], headers: list[tuple[str, str]] | None = None, **options: bool) -> Answer:
    app = LimitBody(echo, Limits(body_bytes=10, body_s=0.05))
    return asyncio.run(ask(app, scope_of(headers=headers or []), parts, **options))


def test_a_body_comes_whole() -> None:
    assert limited([b"12345", b"67890"]).body == b"1234567890"


def test_bodies_that_are_too_large() -> None:
    for answer in (limited([b"12345", b"678901"]), limited([b""], [("content-length", "11")])):
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert "more than 10 bytes" in answer.json["error"]["message"]


def test_a_body_that_does_not_come() -> None:
    answer = limited([b"12"], then_wait=True)
    assert answer.status == 408 and "within 0.05 s" in answer.json["error"]["message"]


def test_a_client_that_stops_reading_counts_as_gone() -> None:
    async def run() -> None:
        async def never(_message: object) -> None:
            await asyncio.Event().wait()

        async def nothing_more() -> dict:
            return {"type": "http.request", "body": b"", "more_body": False}

        app = LimitBody(echo, Limits(stall_s=0.05))
        with pytest.raises(OSError, match="stopped reading"):
            await app(scope_of(), nothing_more, never)

    asyncio.run(run())


def test_rates_are_each_clients_own() -> None:
    now = [0.0]
    limit = LimitRate(echo, per_minute=3, clock=lambda: now[0])
    assert [limit.take("a") for _ in range(3)] == [0, 0, 0]
    assert limit.take("a") == pytest.approx(20.0)
    assert limit.take("b") == 0
    now[0] = 20.1
    assert limit.take("a") == 0
    assert limit.take("a") > 0


def test_who_asks_too_often_is_told_when_to_come_again() -> None:
    async def run() -> list[Answer]:
        app = RequireKey(LimitRate(echo, per_minute=1), KEYS)
        return [await ask(app, scope_of(headers=[("x-api-key", key)])) for key in ("sk-a", "sk-a", "sk-b")]

    answers = asyncio.run(run())
    assert [answer.status for answer in answers] == [200, 429, 200]
    assert 59 <= int(answers[1].headers["retry-after"]) <= 60


def test_nothing_new_while_it_drains() -> None:
    async def run() -> list[int]:
        readiness = Readiness()
        app = TakeNothingNew(echo, readiness)
        found = [(await ask(app, scope_of())).status]
        readiness.state = "ready"
        found.append((await ask(app, scope_of())).status)
        assert await readiness.drain(0.0, _nothing) == 0
        refused = await ask(app, scope_of())
        assert refused.headers["retry-after"] and "draining" in refused.json["error"]["message"]
        return [*found, refused.status, (await ask(app, scope_of("/health", "GET"))).status]

    assert asyncio.run(run()) == [503, 200, 503, 200]


def test_draining_waits_for_answers_then_ends_them() -> None:
    async def run() -> None:
        readiness, ended = Readiness(), []
        readiness.enter()
        asyncio.get_running_loop().call_soon(readiness.leave)
        assert await readiness.drain(30.0, _nothing) == 0
        readiness.enter()

        async def end() -> None:
            ended.append(readiness.answering)
            readiness.leave()

        assert await readiness.drain(0.01, end) == 1
        assert ended == [1]

    asyncio.run(run())


async def _nothing() -> None:
    raise AssertionError("everything had finished")


@pytest.mark.parametrize(
    ("given", "kept"), [("my-id_7", True), ("x" * 129, False), ("a b", False), ("a\tb", False), ("", False)]
)
def test_request_ids_are_echoed(given: str, kept: bool) -> None:
    heard: list[Exchange] = []
    headers = [("x-request-id", given)] if given else []
    answer = asyncio.run(ask(Observe(echo, heard.append), scope_of(headers=headers)))
    assert (answer.headers["x-request-id"] == given) is kept
    assert heard[0].notes.request_id == answer.headers["x-request-id"]
    assert (heard[0].status, heard[0].route, heard[0].client) == (200, "other", "10.0.0.1")


@pytest.mark.parametrize(("size", "is_kept"), [(1, True), ((1 << 18) + 1, False)], ids=["short", "long"])
def test_what_a_long_body_left_is_given_back(size: int, is_kept: bool) -> None:
    class InvalidError(Exception):
        """That can be looked at without being held."""

    left: list[weakref.ref[InvalidError]] = []

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        """As a body that does not fulfil a schema: an error that refers to itself."""
        error = InvalidError((await receive())["body"])
        error.__context__ = RuntimeError(error)
        left.append(weakref.ref(error))
        await echo(scope, receive_nothing, send)

    async def receive_nothing() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    gc.disable()
    try:
        answer = asyncio.run(ask(LimitBody(fail, Limits()), scope_of(), [b"x" * size]))
        assert (answer.status, left[0]() is not None) == (200, is_kept)
    finally:
        gc.enable()
