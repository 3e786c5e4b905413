"""`moesaic loadtest` on a server whose answers are known."""

from tests.serve.listening import listening
from tests.serve.loadtest.fake_openai import FakeOpenAi

SHORT = ("--requests", "4", "--concurrency", "2", "--prompt-tokens", "9", "--output-tokens", "5")


def test_a_table_of_latencies(moesaic, tmp_path):
    with listening(FakeOpenAi().app) as url:
        ran = moesaic("loadtest", url, *SHORT, "--plot", tmp_path / "load.html")
    assert ran.exit_code == 0, ran.err
    assert "4 of 4 answered" in ran.out and "p99" in ran.out
    assert "tokens/s of a user" in ran.out
    assert (tmp_path / "load.html").read_text().count("<figure>") == 5


def test_json_has_every_figure(moesaic, monkeypatch):
    fake = FakeOpenAi()
    with listening(fake.app) as url:
        ran = moesaic("loadtest", f"{url}/v1", *SHORT, "--json", "--field", "temperature=0.5", "--field", "user=me")
    assert (ran.json["completed"], ran.json["output_tokens"], ran.json["workload"]["concurrency"]) == (4, 20, 2)
    assert ran.json["first_token_s"]["p95"] > 0
    assert (fake.bodies[0]["temperature"], fake.bodies[0]["user"]) == (0.5, "me")


def test_what_cannot_be_tested_is_one_line(moesaic, tmp_path):
    for arguments, words in (
        (["http://127.0.0.1:9"], "does not answer (no connection)"),
        (["127.0.0.1:8000"], "is no address"),
        (["http://127.0.0.1:9", "--rate", "-1"], "rate=-1.0; use more than 0"),
        (["http://127.0.0.1:9", "--plot", tmp_path / "no" / "x.svg"], "make it first"),
        (["http://127.0.0.1:9", "--field", "temperature"], "write name=value"),
    ):
        ran = moesaic("loadtest", *arguments)
        assert (ran.exit_code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
        assert words in ran.err
