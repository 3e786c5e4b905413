"""What goes wrong, as each protocol's clients expect to be told. Nothing of a traceback goes out; it is logged."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from moesaic.errors import MoesaicError, QueueFullError, ServerClosingError
from moesaic.serve.served import UnknownModelError

log = logging.getLogger("moesaic.serve")

ANTHROPIC_PATHS = ("/v1/messages",)
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 429: "rate_limit_exceeded"}
_NEVER_OURS = "the server failed; its log says how"


class ApiError(Exception):
    """An answer that is an error. param: the field it is about; code: what programs go by. details: what Anthropic's
    clients go by.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers
        self.details = details


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is not as it should be."""
    return ApiError(400, message, param=param, code=code)


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """An error in the shape of the protocol that a path belongs to."""
    if path.startswith(ANTHROPIC_PATHS):
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        details = {"details": error.details} if error.details else {}
        return {"type": "error", "error": {"type": kind, "message": error.message, **details}}
    kind = _OPENAI_TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    code = error.code or _CODES.get(error.status)
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def error_response(path: str, error: ApiError) -> JSONResponse:
    """The same as an answer; middleware that refuses requests uses it, too."""
    return JSONResponse(error_body(path, error), error.status, dict(error.headers or {}))


def as_api_error(error: Exception) -> ApiError:
    """Any exception as what the client is told. What is not the client's doing is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownModelError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), headers={"Retry-After": "1"})
    if isinstance(error, ServerClosingError):
        return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": "5"})
    if isinstance(error, MoesaicError):
        return refused(str(error))
    log.error("a request failed", exc_info=error)
    return ApiError(500, _NEVER_OURS, code="internal_error")


def add_error_handlers(app: FastAPI) -> None:
    """Every error of the application in its protocol's shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return error_response(request.url.path, as_api_error(error))

    async def answer_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)
        return error_response(request.url.path, _of_http(request, error))

    async def answer_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(request.url.path, _unread(request, error) or invalid(error.errors(), error.body))

    for kind in (ApiError, MoesaicError, Exception):
        app.add_exception_handler(kind, answer)
    for kind in (HTTPException, StarletteHTTPException):
        app.add_exception_handler(kind, answer_http)
    app.add_exception_handler(RequestValidationError, answer_invalid)


def _of_http(request: Request, error: StarletteHTTPException) -> ApiError:
    where = f"{request.method} {request.url.path}"
    said = {
        404: f"unknown path: {where}{_base_of(request)}",
        405: f"this path does not take {request.method}",
    }
    return ApiError(error.status_code, said.get(error.status_code, str(error.detail)), headers=error.headers)


def _base_of(request: Request) -> str:
    """What is wrong with the address that a client was given, where that can be told from the path."""
    parts = [part for part in request.url.path.split("/") if part not in ("", "v1")]
    found = "/".join(["", "v1", *parts])
    return f"; {found} is here: check the client's base URL" if found in request.app.state.paths else ""


def _unread(request: Request, error: RequestValidationError) -> ApiError | None:
    """What a body is that has not even become an object."""
    if request.method != "POST" or isinstance(error.body, dict):
        return None
    if isinstance(error.body, bytes):  # pages of other sites can send such without asking, so it is not read
        return refused("a body that does not say it is JSON; send the header content-type: application/json")
    if error.body is None:
        return refused("the body is empty; send a JSON object", code="invalid_json")
    return refused(f"the body is no JSON object but a {type(error.body).__name__}; send an object", code="invalid_json")


def invalid(errors: Any, body: Any = None) -> ApiError:
    """The first thing that is wrong with a body."""
    first = _most_telling(list(errors))
    param = ".".join(str(part) for part in _place(first, body)) or None
    kind = first["type"]
    if kind == "none_required":
        return refused(f"'{param}' is not supported here; leave it out", param, "unsupported_parameter")
    if kind == "extra_forbidden":
        return refused(f"Unrecognized request argument supplied: {param}", param, "unknown_parameter")
    if kind == "missing":
        return refused(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    if kind == "json_invalid":
        return refused(f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", code="invalid_json")
    said = first["msg"].removeprefix("Value error, ")
    return refused(f"Invalid value for '{param}': {said}" if param else said, param, "invalid_value")


def _place(error: Mapping[str, Any], body: Any) -> list[Any]:
    """Where in the body, without the names that pydantic gives to members of a union."""
    where, *parts = error["loc"]
    if where != "body":
        return parts
    found = []
    for part in parts:
        if isinstance(body, dict) and (part in body or (part is parts[-1] and error["type"] == "missing")):
            found.append(part)
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            found.append(part)
            body = body[part]
    return found


def _most_telling(errors: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of a union's errors, one for each member, that which got furthest."""
    return max(errors, key=lambda error: len(error["loc"]))
