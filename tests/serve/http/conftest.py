"""A server with a tiny model, and the official clients of it."""

import dataclasses
import socket
import threading
from collections.abc import Iterator
from functools import cache

import anthropic
import openai
import pytest
import uvicorn

from moesaic.engine.engine import Engine
from moesaic.serve.http.app import create_app
from moesaic.serve.served import Models, Served
from tests.serve import tiny
from tests.tiny import lively_decoder

MODEL = "tiny"
LONG = "tiny-long"  # with room for the descriptions of tools


@cache
def long_engine() -> Engine:
    """The same model, made for longer texts."""
    config = dataclasses.replace(tiny.engine().config, context_length=4096)
    return Engine(lively_decoder(config), threads=1)


class Server:
    """A uvicorn server in a thread, on a port that the system chose."""

    def __init__(self) -> None:
        engines = {MODEL: tiny.engine(), LONG: long_engine()}
        models = [
            Served.of_engine(name, engine, tiny.tokenizer(), created=1, embeddings="mean" if name == LONG else None)
            for name, engine in engines.items()
        ]
        app = create_app(Models(models))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        listening = socket.create_server(("127.0.0.1", 0))  # who comes before the server has started waits in its queue
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, args=([listening],), name="server", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    it = Server()
    yield it
    it.stop()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client
