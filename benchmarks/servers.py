"""Servers as processes for benchmarks, and load from a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError

from peers.vllm_threads import vllm_threads

START_S = 600.0


class ServerProcess:
    """A server that is ready. url: where; command: with {port}, which is chosen here.

    environment: beside this process's own.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        ready: str = "/health",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        words = [word.replace("{port}", str(port)) for word in command]
        surroundings = os.environ | dict(environment or {})
        self.process = subprocess.Popen(words, stdout=self._log, stderr=self._log, env=surroundings)
        try:
            self._wait(self.url + ready)
        except BaseException:  # also where the benchmark is ended meanwhile
            self.stop()
            raise

    def _wait(self, url: str) -> None:
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self.process.poll() is not None:
                sys.exit(f"{self.name} ended while it started:\n{self.said()[-2000:]}")
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (URLError, OSError):
                time.sleep(0.2)
        sys.exit(f"{self.name} was not ready after {START_S:.0f} s")

    def said(self) -> str:
        """All that it has written."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def rest(self) -> None:
        """Take no processor until `go`."""
        self._signal(signal.SIGSTOP)

    def go(self) -> None:
        self._signal(signal.SIGCONT)

    def memory_bytes(self) -> int:
        """Resident now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    def stop(self) -> None:
        """End it, whatever it does."""
        self._signal(signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def _signal(self, number: int) -> None:
        """To all its processes."""
        if self.process.poll() is None:
            for pid in _with_descendants(self.process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)


def moesaic(name: str, model: str, *options: str) -> ServerProcess:
    """Ours, with one model."""
    command = [sys.executable, "-m", "moesaic", "serve", f"model={model}", "--port", "{port}", "--log-format", "none"]
    return ServerProcess(name, [*command, *options], ready="/ready")


def load(url: str, *options: str) -> dict[str, Any]:
    """What `moesaic loadtest` finds."""
    command = [sys.executable, "-m", "moesaic", "loadtest", url, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONWARNINGS": ""})
    if done.returncode not in (0, 2) or not done.stdout:
        sys.exit(f"the load test failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout)


def vllm(name: str, peers: Path, model: str, threads: int, *, context: int, zentorch: bool) -> ServerProcess:
    """vLLM's, as install.py put it into `peers`; its engine in one process beside the one that speaks HTTP."""
    python, script = peers / "vllm/bin/python", Path(__file__).parent / "peers/serve_vllm.py"
    options = ["--model", model, "--host", "127.0.0.1", "--port", "{port}", "--dtype", "bfloat16"]
    options += ["--max-model-len", str(context), "--max-num-seqs", "32", "--max-num-batched-tokens", "2048"]
    options += ["--no-enable-prefix-caching", "--gpu-memory-utilization", "0.3"]  # no prefixes are shared; of memory
    path = str(peers / "zentorch") if zentorch else ""
    environment = vllm_threads(peers, threads) | {"PYTHONPATH": path}
    return ServerProcess(name, [str(python), str(script), *options], environment=environment)


def _with_descendants(pid: int) -> list[int]:
    """The process and all that it has started, those whose parent has ended meanwhile left out."""
    found = [pid]
    for each in found:
        for listed in Path(f"/proc/{each}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, listed.read_text().split())
    return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]
