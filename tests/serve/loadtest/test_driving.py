"""A load test against a server whose answers are known."""

import asyncio

import pytest

from moesaic.serve.loadtest.asking import Asked, LoadTestError, Server
from moesaic.serve.loadtest.driving import Progress, drive
from moesaic.serve.loadtest.summary import summarize
from moesaic.serve.loadtest.workload import Workload
from tests.serve.listening import listening
from tests.serve.loadtest.fake_openai import TEMPLATE_TOKENS, FakeOpenAi


def loaded(fake: FakeOpenAi, workload: Workload, **options) -> list[Asked]:
    async def run(url: str) -> list[Asked]:
        server = Server(url, **options)
        try:
            return await drive(server, workload, Progress())
        finally:
            await server.close()

    with listening(fake.app) as url:
        return asyncio.run(run(url))


@pytest.mark.parametrize("chat", [False, True])
def test_everything_is_asked_and_counted(chat: bool) -> None:
    fake = FakeOpenAi()
    workload = Workload(concurrency=3, requests=10, prompt_tokens=40, output_tokens=6)
    found = summarize(loaded(fake, workload, chat=chat))
    assert (found.requests, found.completed, found.errors, found.output_tokens) == (10, 10, {}, 60)
    assert found.prompt_tokens == 10 * (40 + TEMPLATE_TOKENS)  # two tokens a word were measured, template aside
    assert found.first_token_s.percentiles[50] > 0
    assert fake.most_running <= 3
    assert {body["model"] for body in fake.bodies} == {"fake"}


def test_at_random_times_nothing_waits_for_an_answer() -> None:
    fake = FakeOpenAi()
    asked = loaded(fake, Workload(rate=200.0, requests=30, prompt_tokens=5, output_tokens=3))
    assert [each.error for each in asked] == [None] * 30
    assert all(len(each.gaps_s) == 2 for each in asked)


def test_refusals_are_errors_of_their_kind() -> None:
    found = summarize(loaded(FakeOpenAi(busy=2), Workload(concurrency=2, requests=6, prompt_tokens=5, output_tokens=3)))
    assert (found.errors, found.completed, found.output_tokens) == ({"429": 2}, 4, 12)


def test_a_stream_that_breaks_off_is_no_answer() -> None:
    for ends, error in (("", "unfinished"), ('{"error": {"message": "broken"}}', "error in the stream")):
        asked = loaded(FakeOpenAi(ends=ends), Workload(concurrency=1, requests=2, prompt_tokens=5, output_tokens=3))
        assert [each.error for each in asked] == [error] * 2


def test_clients_that_leave_are_not_answered() -> None:
    fake = FakeOpenAi()
    asked = loaded(fake, Workload(concurrency=2, requests=8, prompt_tokens=5, output_tokens=400, leave=1.0))
    assert [each.error for each in asked] == ["left"] * 8


def test_fields_go_into_each_request() -> None:
    fake = FakeOpenAi()
    workload = Workload(concurrency=1, requests=1, prompt_tokens=5, output_tokens=3)
    loaded(fake, workload, fields={"temperature": 0.5, "ignore_eos": None, "user": "me"})
    assert fake.bodies[0]["temperature"] == 0.5
    assert fake.bodies[0]["user"] == "me"
    assert "ignore_eos" not in fake.bodies[0]


def test_a_server_that_is_not_there() -> None:
    async def ask() -> None:
        server = Server("http://127.0.0.1:9")
        try:
            await server.measure_words()
        finally:
            await server.close()

    with pytest.raises(LoadTestError, match="no connection"):
        asyncio.run(ask())
