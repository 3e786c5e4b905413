"""Clients that are slow, large or many, on real sockets."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from moesaic.serve.operation.body import LimitBody
from moesaic.serve.operation.connection import guarded
from moesaic.serve.operation.settings import Limits
from tests.serve.listening import listening
from tests.serve.operation.asgi import echo

GOOD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi"


@contextmanager
def connected(limits: Limits) -> Iterator[socket.socket]:
    with listening(LimitBody(echo, limits), http=guarded(limits)) as url:
        host, port = url.removeprefix("http://").split(":")
        with closing(socket.create_connection((host, int(port)), timeout=20)) as client:
            yield client


def read_all(client: socket.socket) -> bytes:
    found = b""
    while part := client.recv(65536):
        found += part
    return found


@pytest.mark.parametrize(
    "sent", [b"", b"POST / HT", b"POST / HTTP/1.1\r\nhost: x\r\n"], ids=["nothing", "some", "more"]
)
def test_headers_must_come_soon(sent: bytes) -> None:
    with connected(Limits(header_s=0.1)) as client:
        client.sendall(sent)
        assert read_all(client).startswith(b"HTTP/1.1 408 ")


def test_headers_must_be_small() -> None:
    with connected(Limits(header_bytes=1000)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nx: ")
        client.sendall(b"y" * 1001)
        assert read_all(client).startswith(b"HTTP/1.1 431 ")


def test_a_body_must_come_soon() -> None:
    with connected(Limits(body_s=0.1)) as client:
        client.sendall(GOOD[:-1])
        assert read_all(client).startswith(b"HTTP/1.1 408 ")


def test_idle_connections_are_closed() -> None:
    with connected(Limits(header_s=0.1)) as client:
        client.sendall(GOOD)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(GOOD)  # the same connection again: its clock begins anew
        assert b"hi" in client.recv(65536) + client.recv(65536)


def test_there_is_a_most_of_connections() -> None:
    with connected(Limits(connections=1)) as first:
        first.sendall(GOOD)
        first.recv(65536)
        with closing(socket.create_connection(first.getpeername(), timeout=20)) as second:
            assert read_all(second).startswith(b"HTTP/1.1 503 ")


def test_what_is_no_http_is_refused() -> None:
    with connected(Limits()) as client:
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 400 ")


def test_too_large_a_body_is_answered_before_it_is_sent() -> None:
    with connected(Limits(body_bytes=100)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n" + b"x" * 5000)
        assert client.recv(12) == b"HTTP/1.1 413"
