"""GET /: the page, a chat beside the experts at work. Its files lie in serve/page."""

import hashlib
from importlib.resources import files
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

from moesaic.serve.http.errors import ApiError

router = APIRouter(include_in_schema=False)

# Nothing from elsewhere and nothing inline; no text can become markup, as there is no policy that makes any.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


class _File(NamedTuple):
    content: bytes
    kind: str
    tag: str


def _read() -> dict[str, _File]:
    """Every file of the page, by name."""
    places = [*(files("moesaic.serve") / "page").iterdir(), files("moesaic.telemetry") / "page" / "colours.css"]
    found = {}
    for place in places:
        kind = _KINDS.get(place.name.rpartition(".")[2])
        if kind is not None:
            content = place.read_bytes()
            found[place.name] = _File(content, kind, f'"{hashlib.sha256(content).hexdigest()[:20]}"')
    return found


_FILES = _read()


@router.get("/")
async def index(request: Request) -> Response:
    """The page itself."""
    return _answer(request, "index.html")


@router.get("/page/{name}")
async def page_file(name: str, request: Request) -> Response:
    """A file of it."""
    if name not in _FILES:
        raise ApiError(404, f"the page has no file {name!r}")
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    """The file, or that it is still what the browser has."""
    file = _FILES[name]
    headers = {**_HEADERS, "ETag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.kind, headers=headers)
