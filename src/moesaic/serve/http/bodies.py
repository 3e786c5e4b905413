"""Bodies as JSON that code behind them need not be afraid of: UTF-8, finite, not nested without end."""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict

_MAYBE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Body(BaseModel):
    """What a client sends: of the right types, with no field that nothing reads."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Answer(BaseModel):
    """What it gets, as the OpenAPI document shows it."""

    model_config = ConfigDict(protected_namespaces=())


class BodyError(HTTPException):
    """A body that cannot be read. An HTTPException, as FastAPI lets only these through while it reads a body."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


class BodyRoute(APIRoute):
    """A route that reads bodies by `parse`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def with_checked_body(request: Request) -> Response:
            return await handle(_CheckedRequest(request.scope, request.receive))

        return with_checked_body


class _CheckedRequest(Request):
    async def json(self) -> Any:
        return parse(await self.body(), self.app.state.settings.max_depth)


def parse(body: bytes, max_depth: int) -> Any:
    """The value that a body is. Raises BodyError for one that is no JSON, or more than a request may be."""
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BodyError(f"the body is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise BodyError(f"the body is nested too deeply; use at most {max_depth} levels") from error
    except ValueError as error:
        raise BodyError(f"the body is not JSON: {error}") from error
    if deeper_than(value, max_depth):
        raise BodyError(f"the body is nested too deeply; use at most {max_depth} levels")
    if _MAYBE_SURROGATE.search(body):
        _check_surrogates(value)
    return value


def deeper_than(value: Any, max_depth: int) -> bool:
    """Whether lists and objects lie in each other more than `max_depth` levels deep."""
    level = [value]
    for _ in range(max_depth + 1):
        level = [inner for outer in level for inner in _members(outer) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _members(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _check_surrogates(value: Any) -> None:
    """Half a UTF-16 pair is a character to Python, but to no tokenizer."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BodyError("the body has half a surrogate pair (\\ud800 to \\udfff), which is no character") from error
