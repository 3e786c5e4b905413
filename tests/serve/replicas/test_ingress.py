"""The ingress in front of replicas that die at will."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from moesaic.serve.replicas.asgi import Message, ask
from moesaic.serve.replicas.ingress import Ingress, ReplicaLostError

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
WAIT: Message = {}
SCOPE: Message = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}


def part(text: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


class Scripted:
    """Answers with the next script; None in one is the replica's death, WAIT takes long."""

    def __init__(self, *scripts: list[Message | None]) -> None:
        self.scripts, self.bodies, self.left = list(scripts), [], 0

    async def ask(self, scope: Message, body: bytes, prefix: Sequence[bytes]) -> AsyncIterator[list[Message]]:
        self.bodies.append(body)
        try:
            for message in self.scripts.pop(0):
                if message is None:
                    raise ReplicaLostError("killed")
                if message is WAIT:
                    await asyncio.sleep(3600)
                yield [message]
        finally:
            self.left += 1


async def collect(ingress: Ingress, body: bytes = b"{}") -> list[Message]:
    return [message async for some in ask(ingress, SCOPE, body) for message in some]


def run(*scripts: list[Message | None], **options: Any) -> tuple[Scripted, list[Message]]:
    replicas = Scripted(*scripts)
    return replicas, asyncio.run(collect(Ingress(replicas, **options)))


WHOLE: list[Message | None] = [START, part(b"one"), part(b"two", more=False)]


def test_an_answer_passes_unchanged() -> None:
    replicas, found = run(WHOLE)
    assert found == WHOLE and replicas.bodies == [b"{}"]


@pytest.mark.parametrize("dead", [[None], [START, None], [START, part(b""), None]], ids=["at once", "head", "empty"])
def test_a_replica_lost_before_the_first_byte_is_not_noticed(dead: list[Message | None]) -> None:
    replicas, found = run(dead, dead, WHOLE)
    assert found == WHOLE
    assert len(replicas.bodies) == replicas.left == 3


def test_an_answer_lost_later_says_so_and_is_broken_off() -> None:
    heard: list[Message] = []

    async def listen() -> None:
        replicas = Scripted([START, part(b"one"), None])
        async for some in ask(Ingress(replicas), SCOPE, b"{}"):
            heard.extend(some)

    with pytest.raises(ConnectionAbortedError):
        asyncio.run(listen())
    assert heard[:2] == [START, part(b"one")]
    said = heard[2]["body"].removeprefix(b"data: ")
    assert json.loads(said)["error"]["code"] == "replica_unavailable" and heard[2]["more_body"]


def test_nobody_answers() -> None:
    _, found = run([None], patience_s=0)
    assert found[0]["status"] == 503 and (b"retry-after", b"5") in found[0]["headers"]
    assert json.loads(found[1]["body"])["error"]["type"] == "server_error"


def test_a_body_that_is_too_large() -> None:
    replicas, found = run(WHOLE, max_body_bytes=1)
    assert found[0]["status"] == 413 and not replicas.bodies


def test_an_answer_without_a_body_is_whole() -> None:
    empty: list[Message | None] = [START, part(b"", more=False)]
    assert run(empty)[1] == empty


def test_a_client_that_leaves_is_told_to_the_replica() -> None:
    replicas = Scripted([START, part(b"one"), WAIT])

    async def leave() -> None:
        messages = ask(Ingress(replicas), SCOPE, b"{}")
        assert await anext(messages)
        await messages.aclose()  # pyright: ignore[reportAttributeAccessIssue]  a generator

    asyncio.run(leave())
    assert replicas.left == 1
