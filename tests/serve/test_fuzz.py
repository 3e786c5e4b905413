"""A few hundred bad requests to a whole server; benchmarks/fuzz_server.py sends it ten thousand."""

from collections.abc import Iterator
from types import ModuleType

import pytest

from moesaic.serve.operation.settings import settings_of
from tests.benchmark_programs import imported
from tests.serve import tiny
from tests.serve.operation.whole import serving

MODEL = {"path": str(tiny.folder()), "threads": 1, "cache": 4096, "max_length": 256}
LIMITS = {"header_s": 1, "body_s": 1, "new_tokens": 16, "choices": 4, "timeout_s": 20}


@pytest.fixture
def fuzzing() -> Iterator[ModuleType]:
    with imported(["fuzzing"]) as programs:
        yield programs.fuzzing


@pytest.fixture
def url() -> Iterator[str]:
    with serving(settings_of({"models": {"model": MODEL}, "limits": LIMITS})) as client:
        yield str(client.base_url).rstrip("/")


def test_bytes_that_no_client_should_send(fuzzing: ModuleType, url: str) -> None:
    findings, expected = fuzzing.Findings(), fuzzing.good_text(url, "model")
    fuzzing.raw_cases(url, 140, 0, findings)
    fuzzing.slow_clients(url, 6, findings)
    assert not findings.wrong
    assert findings.statuses["400"] > 20 and findings.statuses["408"] >= 4
    assert fuzzing.good_text(url, "model") == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
def test_requests_by_our_own_document(fuzzing: ModuleType, url: str) -> None:
    findings, expected = fuzzing.Findings(), fuzzing.good_text(url, "model")
    fuzzing.schema_cases(url, 200, 0, findings)
    assert not findings.wrong
    assert findings.statuses["200"] > 10 and findings.statuses["400"] > 20
    assert fuzzing.good_text(url, "model") == expected
