"""What routes may answer, for the OpenAPI document."""

from typing import Any

from moesaic.serve.http.bodies import Answer


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    error: ErrorDetail


Responses = dict[int | str, dict[str, Any]]
_STATUSES = (400, 401, 404, 405, 413, 422, 429, 500, 503)
ERRORS: Responses = {status: {"model": ErrorAnswer} for status in _STATUSES}


def answers(model: type[Answer]) -> Responses:
    """A body of this model, or events, or an error."""
    return {200: {"model": model, "content": {"text/event-stream": {"schema": {"type": "string"}}}}, **ERRORS}
