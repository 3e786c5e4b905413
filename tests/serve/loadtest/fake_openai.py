"""A server that speaks just enough of OpenAI's protocol, with an answer that is known."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

TEMPLATE_TOKENS = 7


class FakeOpenAi:
    """Every word is two tokens. It remembers the bodies; what it streams ends as `ends` says.

    busy: so many requests are refused first.
    """

    def __init__(self, *, ends: str = "[DONE]", busy: int = 0) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.ends, self.busy, self.running, self.most_running = ends, busy, 0, 0
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
            ]
        )

    async def models(self, _: Request) -> Response:
        return JSONResponse({"data": [{"id": "fake"}]})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        prompt = body.get("prompt") or body["messages"][0]["content"]
        used = {"prompt_tokens": 2 * len(prompt.split()) + TEMPLATE_TOKENS, "completion_tokens": body["max_tokens"]}
        if not body.get("stream"):
            return JSONResponse({"usage": used})
        if self.busy:
            self.busy -= 1
            return JSONResponse({"error": {"message": "busy"}}, 429, {"retry-after": "1"})
        self.bodies.append(body)
        return StreamingResponse(self.stream(body["max_tokens"], used), media_type="text/event-stream")

    async def stream(self, count: int, used: dict[str, int]) -> AsyncIterator[str]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for _ in range(count):
                await asyncio.sleep(0)
                yield f"data: {json.dumps({'choices': [{'text': 'x', 'delta': {'content': 'x'}}]})}\n\n"
            yield f"data: {json.dumps({'choices': [], 'usage': used})}\n\n"
            if self.ends:
                yield f"data: {self.ends}\n\n"
        finally:
            self.running -= 1
