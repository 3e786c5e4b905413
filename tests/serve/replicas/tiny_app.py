"""The application that replicas of the tests run: the tiny model, and a route that tells which process answers."""

import os

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from moesaic.serve.http.app import create_app
from moesaic.serve.served import Models, Served
from tests.serve import tiny


def make(name: str, processors: int) -> FastAPI:
    app = create_app(Models([Served.of_engine(name, tiny.engine(threads=processors), tiny.tokenizer())]))

    @app.get("/process")
    def process() -> int:
        return os.getpid()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse("# TYPE up gauge\nup 1.0\n")

    return app
