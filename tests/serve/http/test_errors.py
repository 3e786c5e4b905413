"""Requests that no client library would send: each gets an error in its protocol's shape."""

import json
from typing import Any

import httpx
import pytest

from tests.serve.http.conftest import MODEL, Server

OPENAI = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


def post(server: Server, path: str, data: bytes) -> httpx.Response:
    return httpx.post(server.url + path, content=data, headers={"Content-Type": "application/json"})


def nested(depth: int) -> bytes:
    return json.dumps(BODY)[:-1].encode() + b', "metadata": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"


BAD = {
    "no JSON": b"{",
    "nothing": b"",
    "a list": b"[]",
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "half a pair": json.dumps({**BODY, "messages": [{"role": "user", "content": "\ud800"}]}).encode(),
    "not a number": json.dumps({**BODY, "temperature": float("nan")}).encode(),
    "a huge number": b'{"model": "tiny", "max_tokens": ' + b"9" * 5000 + b"}",
    "an infinite number": json.dumps(BODY)[:-1].encode() + b', "temperature": 1e999}',
    "deep": nested(70),
    "very deep": nested(100_000),
    "cut short": json.dumps(BODY).encode()[:-9],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies(server: Server, name: str) -> None:
    answer = post(server, OPENAI, BAD[name])
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_in_anthropics_shape(server: Server, name: str) -> None:
    answer = post(server, "/v1/messages", BAD[name])
    assert answer.status_code == 400
    assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("path", "status"), [("/v1/nothing", 404), (OPENAI, 405), ("/v1/models/nobody", 404)])
def test_paths_and_methods(server: Server, path: str, status: int) -> None:
    answer = httpx.get(server.url + path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_the_server_still_serves(server: Server) -> None:
    answer = post(server, OPENAI, json.dumps(BODY).encode())
    assert answer.status_code == 200


def test_every_status_is_declared(server: Server) -> None:
    document: Any = httpx.get(f"{server.url}/openapi.json").json()
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize"):
        declared = set(document["paths"][path]["post"]["responses"])
        assert {"200", "400", "404", "405", "413", "429", "500", "503"} <= declared
