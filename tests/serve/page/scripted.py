"""A server with our page and models that say what a test tells them to, no faster than it lets them."""

import asyncio
import json
import random
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from moesaic.serve.http import page
from moesaic.serve.http.errors import add_error_handlers

LAYERS, EXPERTS, TOP_K = 6, 16, 2


class Script:
    """What the next answers are. go: holds back all tokens from `hold_from` on until it is set.

    asked: bodies that came. key: that is asked for. dense: the model has no experts. template: it has a chat template.
    """

    def __init__(self) -> None:
        self.pieces = ["Hello", " there", "."]
        self.names = ["scripted"]
        self.hold_from: int | None = None
        self.pause_s = 0.0
        self.reasoning = ""
        self.key: str | None = None
        self.dense = False
        self.template = True
        self.error: dict[str, Any] | None = None
        self.asked: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.go = threading.Event()


def experts_of(place: int) -> dict[str, list[list[int]]]:
    """Of the token at a place: the first choice of layer l is l + place."""
    return {str(layer): [[(layer + place) % EXPERTS, (layer * 3 + place + 5) % EXPERTS]] for layer in range(LAYERS)}


def scripted_app(script: Script) -> FastAPI:
    app = FastAPI()
    add_error_handlers(app)
    app.include_router(page.router)

    def refused(request: Request) -> JSONResponse | None:
        if script.key is None or request.headers.get("authorization") == f"Bearer {script.key}":
            return None
        return JSONResponse({"error": {"message": "no API key", "code": "invalid_api_key"}}, 401)

    @app.get("/v1/models", response_model=None)
    async def models(request: Request) -> Any:
        return refused(request) or {"data": [{"id": name} for name in script.names]}

    @app.get("/v1/routing/stream", response_model=None)
    async def routing(request: Request) -> Any:
        return refused(request) or StreamingResponse(_loads(script), media_type="text/event-stream")

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Any:
        body = await request.json()
        script.asked.append(body)
        if not script.template:
            message = "scripted has no chat template; use /v1/completions"
            return JSONResponse({"error": {"message": message, "code": None}}, 400)
        if script.error:
            return JSONResponse({"error": script.error}, 400)
        return refused(request) or StreamingResponse(_answer(script, body, "delta"), media_type="text/event-stream")

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Any:
        body = await request.json()
        script.asked.append(body)
        return StreamingResponse(_answer(script, body, "text"), media_type="text/event-stream")

    return app


async def _answer(script: Script, body: dict[str, Any], shape: str) -> AsyncGenerator[str, None]:
    def event(**choice: Any) -> str:
        return f"data: {json.dumps({'choices': [{'index': 0, 'finish_reason': None, **choice}]})}\n\n"

    ended = False
    try:
        if script.reasoning:
            yield event(delta={"reasoning_content": script.reasoning})
        for place, piece in enumerate(script.pieces):
            if place == script.hold_from:
                while not script.go.is_set():
                    await asyncio.sleep(0.01)
            if script.pause_s:
                await asyncio.sleep(script.pause_s)
            told = {"moesaic": {"tokens": [piece], "experts": experts_of(place)}} if body.get("experts") else {}
            yield event(**({"delta": {"content": piece}} if shape == "delta" else {"text": piece}), **told)
        yield event(delta={}, finish_reason="stop")
        usage = {"prompt_tokens": 3, "completion_tokens": len(script.pieces), "total_tokens": 3 + len(script.pieces)}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"
        ended = True
    finally:
        if not ended:
            script.left.set()


async def _loads(script: Script) -> AsyncGenerator[str, None]:
    draw = random.Random(0)
    sizes = {"num_experts": EXPERTS, "top_k": TOP_K}
    layers = [] if script.dense else [{"layer": layer, **sizes} for layer in range(LAYERS)]
    weights = [[draw.random() ** 2 for _ in range(EXPERTS)] for _ in range(LAYERS)]

    def told(kind: str, seconds: float, tokens: int) -> str:
        rows = [draw.choices(range(EXPERTS), weights[layer["layer"]], k=tokens * TOP_K) for layer in layers]
        counted = [
            {**layer, "counts": [row.count(e) for e in range(EXPERTS)], "distinct": len(set(row)) * 10}
            for layer, row in zip(layers, rows, strict=True)
        ]
        head = {"routes": not script.dense, "seconds": seconds, "steps": 10, "tokens": tokens, "layers": counted}
        serving = {"running": 1, "waiting": 0, "cache_used": 0.25}
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **head, 'serving': serving})}\n\n"

    yield told("total", 5.0, 300)
    while True:
        await asyncio.sleep(0.1)
        yield told("window", 0.5, draw.randrange(5, 40))


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The address of a server in a thread, on a port that the system chose."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],), name="page server", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(30)
