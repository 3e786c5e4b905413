"""`moesaic serve` as a process: it says where it is, answers, refuses, drains and ends."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.serve import tiny


class Serving:
    """A server process that is ready."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        words = [sys.executable, "-m", "moesaic", "serve", *arguments, "--port", "0", "--json"]
        pipe, all_variables = subprocess.PIPE, {**os.environ, **(environment or {})}
        self.process = subprocess.Popen(words, env=all_variables, stdout=pipe, stderr=pipe, text=True)
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.headers: dict[str, str] = {}
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended: {self.wait()}"
        self.start = json.loads(line)
        self.url = self.start["url"]

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self._said += self.process.stderr

    def end(self) -> str:
        """End it; all that it said."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> str:
        """Until it ends, with an exit code of 0; all that it said."""
        assert self.process.wait(60) == 0, self._said
        self._listener.join(60)
        return "".join(self._said)

    def ask(self, **fields: Any) -> httpx.Response:
        body = {"model": self.start["models"][0], "prompt": "the fox", "max_tokens": 4, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60, headers=self.headers)

    def close(self) -> None:
        self.process.kill()
        self._listener.join(60)
        with self.process:  # closes its pipes
            pass


@pytest.fixture
def serve() -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def start(*arguments: str, **options: Any) -> Serving:
        started.append(Serving(*arguments, **options))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.mark.slow
def test_it_answers_counts_and_ends(serve, tmp_path) -> None:
    served = serve(f"tiny={tiny.folder()}", "--log-format", "json")
    assert served.start["models"] == ["tiny"]
    assert served.ask().json()["usage"]["completion_tokens"] == 4
    assert httpx.get(f"{served.url}/ready").json() == {"status": "ready"}
    assert 'moesaic_generation_tokens_total{model="tiny"} 4.0' in httpx.get(f"{served.url}/metrics").text
    said = served.end().splitlines()
    assert "of weights" in said[0] and f"serving tiny at {served.url}" in said[1] and said[2].startswith("next: curl ")
    line = json.loads(said[3])
    assert (line["route"], line["status"], line["completion_tokens"]) == ("/v1/completions", 200, 4)


@pytest.mark.slow
def test_running_requests_finish_and_new_ones_are_refused(serve) -> None:
    served = serve(f"tiny={tiny.folder()}")
    body = {"model": "tiny", "prompt": "fox", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]
    assert sum('"text"' in line for line in rest) >= 399
    assert "1 requests have 30 s to finish" in served.wait()


@pytest.mark.slow
def test_at_the_end_of_draining_requests_end_with_what_they_have(serve) -> None:
    served = serve(f"tiny={tiny.folder()}", "--drain-seconds", "0")
    body = {"model": "tiny", "prompt": "fox", "max_tokens": 500, "n": 64, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert sum('"finish_reason":"length"' in line for line in rest) == 64
    assert sum('"text"' in line for line in rest) < 64 * 500
    assert "1 requests ended with what they had" in served.wait()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(serve) -> None:
    served = serve(f"tiny={tiny.folder()}")
    body = {"model": "tiny", "prompt": "fox", "max_tokens": 500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
        served.process.send_signal(signal.SIGSTOP)
        served.process.send_signal(signal.SIGTERM)
        served.process.send_signal(signal.SIGINT)
        served.process.send_signal(signal.SIGCONT)
        assert served.process.wait(30) == 0


@pytest.mark.slow
def test_keys_keep_others_out_and_out_of_the_log(serve) -> None:
    served = serve(f"tiny={tiny.folder()}", environment={"MOESAIC_API_KEYS": "alice:sk-very-secret"})
    assert served.ask().status_code == 401
    served.headers = {"authorization": "Bearer sk-very-secret"}
    assert served.ask().status_code == 200
    assert httpx.get(f"{served.url}/health").status_code == 200
    said = served.end()
    assert "sk-very-secret" not in said and " alice " in said


@pytest.fixture
def certificate(tmp_path):
    """A certificate for localhost that signed itself."""
    place = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", str(place[0]), "-keyout", str(place[1])]
    subprocess.run([*words, *names], check=True, capture_output=True)
    return place


@pytest.mark.slow
def test_tls(serve, certificate) -> None:
    cert, key = certificate
    served = serve(f"tiny={tiny.folder()}", "--tls-cert", str(cert), "--tls-key", str(key))
    assert served.url.startswith("https://")
    trusted = ssl.create_default_context(cafile=str(cert))
    assert httpx.get(f"{served.url}/ready", verify=trusted).status_code == 200


def test_what_cannot_be_served_is_one_line(moesaic, moe_folder, tmp_path) -> None:
    keys, toml, junk = tmp_path / "keys", tmp_path / "serve.toml", tmp_path / "junk.pem"
    keys.write_text("a:x")
    keys.chmod(0o644)
    toml.write_text("[limits]\nqueue = 'many'\n")
    junk.write_text("no PEM")
    for arguments, words in (
        (["nowhere/at/all"], "is no path on this machine"),
        ([moe_folder, f"moe={moe_folder}"], "two models are to be served as 'moe'"),
        ([moe_folder, "--api-key-file", keys], "chmod 600"),
        ([moe_folder, "--api-key-file", tmp_path / "none"], "cannot read the keys"),
        ([moe_folder, "--port", "99999"], "port=99999; use 1 to 65535"),
        ([moe_folder, "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        ([moe_folder, "--experts-bits", "4"], "experts_bits without bits"),
        ([moe_folder, "--cache", "lots"], "cache='lots'"),
        ([moe_folder, "--config", toml], "limits.queue='many'; it must be a whole number"),
        ([moe_folder, "--config", tmp_path / "none.toml"], "No such file"),
        ([moe_folder, "--set", "limits.quue=3"], "did you mean 'queue'?"),
        ([moe_folder, "--tls-cert", junk], "TLS needs both"),
        ([moe_folder, "--tls-cert", junk, "--tls-key", junk, "--port", "0"], "give a PEM pair"),
    ):
        ran = moesaic("serve", *arguments)
        assert (ran.exit_code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
        assert words in ran.err


def test_a_port_that_is_taken(moesaic, moe_folder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = moesaic("serve", moe_folder, "--port", str(taken.getsockname()[1]))
    assert ran.exit_code == 2 and "Address already in use; choose another" in ran.err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_replicas_answer_as_one_server() -> None:
    pytest.importorskip("ray", reason="replicas need Ray, which the extra dev brings")
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "RAY_ADDRESS": ""}
    serving = Serving(f"tiny={tiny.folder()}", "--replicas", "2", "--cache", "2048", environment=environment)
    try:
        answers = [serving.ask(prompt="the quick brown fox " * 30, temperature=0).json() for _ in range(2)]
        assert answers[0]["choices"] == answers[1]["choices"]
        assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, "sent where its beginning was seen"
        assert httpx.get(f"{serving.url}/ready", timeout=60).json()["replicas"] == 2
        assert 'replica="1"' in httpx.get(f"{serving.url}/metrics", timeout=60).text
        assert "ending" in serving.end()
    finally:
        serving.close()
