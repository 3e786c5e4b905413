"""The live load of the experts over HTTP: what the engine's steps were, once and as it goes on."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.serve.http.conftest import MODEL, Server

MOST_WINDOWS = 300  # of a tenth of a second


def write(client: openai.OpenAI, num_tokens: int) -> None:
    client.completions.create(model=MODEL, prompt="the quick brown fox", max_tokens=num_tokens)


def test_a_request_is_in_the_counts(client, server: Server) -> None:
    before = httpx.get(f"{server.url}/v1/routing").json()["since_start"]
    write(client, 20)
    told = httpx.get(f"{server.url}/v1/routing", params={"model": MODEL, "seconds": 60}).json()
    assert (told["object"], told["model"], told["routes"]) == ("routing", MODEL, True)
    since = told["since_start"]
    new_tokens, new_steps = since["tokens"] - before["tokens"], since["steps"] - before["steps"]
    assert new_steps >= 19 and new_tokens >= new_steps
    for now, then in zip(since["layers"], before["layers"], strict=True):
        assert sum(now["counts"]) - sum(then["counts"]) == now["top_k"] * new_tokens
        assert now["distinct"] - then["distinct"] >= 2 * new_steps
    assert told["window"]["tokens"] >= new_tokens


@pytest.mark.parametrize(
    ("query", "status"),
    [("model=other", 404), ("seconds=0", 400), ("seconds=1e9", 400), ("seconds=NaN", 400), ("seconds=x", 400)],
)
def test_what_cannot_be_asked(server: Server, query, status) -> None:
    answer = httpx.get(f"{server.url}/v1/routing?{query}")
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def events(answer: httpx.Response) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_windows_add_up_to_what_came_since(client, server: Server) -> None:
    with httpx.stream("GET", f"{server.url}/v1/routing/stream", params={"every": 0.1}, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = events(answer)
        name, total = next(told)
        assert name == total["type"] == "total"
        write(client, 12)
        tokens, counts = 0, [[0] * layer["num_experts"] for layer in total["layers"]]
        for _ in range(MOST_WINDOWS):
            name, window = next(told)
            assert name == "window" and window["seconds"] > 0
            assert window["serving"].keys() >= {"running", "waiting", "cache_used"}
            tokens += window["tokens"]
            for summed, layer in zip(counts, window["layers"], strict=True):
                summed[:] = [a + b for a, b in zip(summed, layer["counts"], strict=True)]
            if tokens >= 12 and not window["serving"]["running"]:
                break
        assert tokens >= 12
        assert [sum(layer) for layer in counts] == [2 * tokens] * len(counts)


def test_the_page_and_its_files(server: Server) -> None:
    page = httpx.get(f"{server.url}/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for part in ("main.js", "frame.css", "colours.css", "icon.svg"):
        file = httpx.get(f"{server.url}/page/{part}")
        assert file.status_code == 200 and file.content
        again = httpx.get(f"{server.url}/page/{part}", headers={"If-None-Match": file.headers["etag"]})
        assert again.status_code == 304 and not again.content
    for part in ("nothing.js", "__init__.py", "..%2Fserved.py", "../served.py", "watch.js"):
        assert httpx.get(f"{server.url}/page/{part}").status_code == 404
