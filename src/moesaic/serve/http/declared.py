"""What routes may answer, for the OpenAPI document."""

from typing import Any, Literal

from moesaic.serve.http.bodies import Answer


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    error: ErrorDetail


class AnthropicDetail(Answer):
    type: str
    message: str


class AnthropicError(Answer):
    type: Literal["error"]
    error: AnthropicDetail


Responses = dict[int | str, dict[str, Any]]
_STATUSES = (400, 401, 403, 404, 405, 408, 413, 422, 429, 431, 500, 503)
ERRORS: Responses = {status: {"model": ErrorAnswer} for status in _STATUSES}

ANTHROPIC_ERRORS: Responses = {status: {"model": AnthropicError} for status in _STATUSES}


def answers(model: type[Answer], errors: Responses = ERRORS) -> Responses:
    """A body of this model, or events, or an error."""
    return {200: {"model": model, "content": {"text/event-stream": {"schema": {"type": "string"}}}}, **errors}
