"""Two replicas on a Ray of this machine, one of which is killed while both write."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import uvicorn

from moesaic.errors import ConfigError
from moesaic.serve.replicas.cluster import Cluster, Settings

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of many kinds
REPOSITORY = Path(__file__).parents[3]
SHORT: dict[str, Any] = {"model": "tiny", "prompt": "the fox", "max_tokens": 5, "ignore_eos": True}


class Outcome(NamedTuple):
    """begun: something was heard. whole: and so was the end."""

    begun: bool
    whole: bool


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), *os.environ.get("PYTHONPATH", "").split(":")]))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with Cluster(Settings("tests.serve.replicas.tiny_app:make", {"name": "tiny"}, replicas=2)) as started:
        yield started


@asynccontextmanager
async def listening(cluster: Cluster) -> AsyncIterator[str]:
    """The address of a server in front of them."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(cluster.app(), log_level="error", lifespan="off"))
        serving = asyncio.ensure_future(server.serve(sockets=[taken]))
        try:
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


async def complete(client: httpx.AsyncClient, number: int, begun: asyncio.Event) -> Outcome:
    prompt = "the quick brown fox " * 4 + str(number)
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 200, "stream": True}
    heard = ""
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for text in answer.aiter_text():
                heard += text
                begun.set()
    except httpx.HTTPError:
        return Outcome(bool(heard), False)
    return Outcome(bool(heard), heard.rstrip().endswith("[DONE]"))


async def both(client: httpx.AsyncClient) -> set[int]:
    """The processes of the two replicas."""
    async with asyncio.timeout(200):
        while True:
            answers = await asyncio.gather(*(client.get("/process") for _ in range(8)))
            found = {answer.json() for answer in answers if answer.status_code == 200}
            if len(found) == 2:
                return found
            await asyncio.sleep(0.2)


async def kill_one_under_load(cluster: Cluster) -> None:
    async with listening(cluster) as url, httpx.AsyncClient(base_url=url, timeout=120) as client:
        before = await both(client)
        assert (await client.get("/metrics")).text.count("up{replica=") == 2
        counted = await asyncio.gather(*(client.post("/v1/completions", json=SHORT) for _ in range(6)))
        assert all(answer.status_code == 200 for answer in counted)
        told = (await client.get("/v1/routing")).json()
        assert told["serving"]["new_tokens"] == 6 * SHORT["max_tokens"], "of both"
        assert (await client.get("/v1/routing?model=nobody")).status_code == 404
        async with client.stream("GET", "/v1/routing/stream?every=0.1") as events:
            heard = events.aiter_lines()
            lines = [await anext(heard) for _ in range(4)]
        assert (lines[0], lines[3]) == ("event: total", "event: window")
        begun = asyncio.Event()
        running = [asyncio.ensure_future(complete(client, number, begun)) for number in range(24)]
        await begun.wait()
        os.kill(min(before), signal.SIGKILL)
        outcomes = await asyncio.gather(*running)
        assert not [outcome for outcome in outcomes if not outcome.begun], "nothing is lost that had not begun"
        assert sum(outcome.whole for outcome in outcomes) >= 1
        after = asyncio.Event()
        again = await asyncio.gather(*(complete(client, number, after) for number in range(4)))
        assert all(outcome.whole for outcome in again), "service continues"
        assert (await client.get("/health")).status_code == 200
        assert min(before) not in await both(client), "another takes its place"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_of_two_replicas_is_killed_under_load(cluster: Cluster) -> None:
    asyncio.run(kill_one_under_load(cluster))


def test_no_replicas() -> None:
    options: dict[str, Any] = {}
    with pytest.raises(ConfigError, match="replicas=0; use 1 or more"):
        Cluster(Settings("module:function", options, replicas=0))
