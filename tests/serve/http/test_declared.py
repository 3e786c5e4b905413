"""What the OpenAPI document says is what the server does: generated requests, good and bad."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import status_code_conformance

from tests.serve.http.conftest import Server

PATHS = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
]
CHECKS: list[Any] = list(HealthCheck)
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name)
@pytest.mark.parametrize("path", PATHS)
def test_generated_requests(document: Any, path: str, mode: GenerationMode) -> None:
    @settings(max_examples=25, derandomize=True, database=None, suppress_health_check=CHECKS)
    @given(case=document[path]["POST"].as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            case.body |= {name: min(value, 4) for name in LIMITS if isinstance(value := case.body.get(name), int)}
            case.body |= {"model": "tiny"} if "model" in case.body and mode is GenerationMode.POSITIVE else {}
        case.call_and_validate(checks=[not_a_server_error, status_code_conformance])

    ask()
