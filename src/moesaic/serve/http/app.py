"""The application: models by name, behind the protocols."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from moesaic.serve.http import chat, completions, embeddings, messages, models, page, responses, routing, tokens
from moesaic.serve.http.errors import add_error_handlers
from moesaic.serve.http.response_store import ResponseStore
from moesaic.serve.http.settings import HttpSettings
from moesaic.serve.served import Models

ROUTERS = tuple(
    protocol.router for protocol in (chat, completions, embeddings, messages, models, page, responses, routing, tokens)
)


def create_app(served: Models, settings: HttpSettings | None = None) -> FastAPI:
    """The protocols in front of these models, which start and close with the application.

    Routes find them as `request.app.state.models`. Middleware should be plain ASGI, not starlette's BaseHTTPMiddleware,
    which hides from the routes that a client has left.
    """

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncGenerator[None, None]:
        await served.start()
        try:
            yield
        finally:
            await served.close()

    app = FastAPI(title="moesaic", lifespan=running, docs_url=None, redoc_url=None)
    settings = settings or HttpSettings()
    app.state.models, app.state.settings = served, settings
    app.state.responses = ResponseStore(settings.stored_responses)
    app.state.paths = frozenset(getattr(route, "path", "") for router in ROUTERS for route in router.routes)
    app.state.ending = lambda: False  # asked by what would otherwise go on for ever
    add_error_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    return app
