"""One engine with one model in one format, from whom samples can be taken in turns with others."""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

SECONDS_PER_SAMPLE = 600


class Case(NamedTuple):
    """What is timed: `decode` of so many texts at once, or `prefill` of so many tokens."""

    kind: str
    size: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.size}"

    @classmethod
    def named(cls, name: str) -> "Case":
        kind, size = name.split()
        return cls(kind, int(size))


class EngineError(Exception):
    """An engine that did not start, or did not answer; what it last said."""


class Source(Protocol):
    """Where samples come from."""

    def start(self) -> None:
        """Load what samples need. Raises EngineError."""
        ...

    def sample(self, case: Case) -> float:
        """Tokens a second. Raises EngineError."""
        ...

    def close(self) -> None: ...


class Contender(NamedTuple):
    """An engine and a format as tables name them, where its samples come from, and the bytes of its matrices by part.

    packed_bytes: asked once samples have been taken.
    """

    engine: str
    variant: str
    source: Source
    packed_bytes: Callable[[], dict[str, int]]

    @property
    def name(self) -> str:
        return f"{self.engine} {self.variant}"


class Worker:
    """A script that loads a model once and then answers (worker.py); stopped whenever it is not asked.

    A process that is stopped takes no processor from the others, however its threads wait.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._command, self._environment = list(command), dict(environment or {})
        self._process: subprocess.Popen[str] | None = None
        self.facts: dict[str, Any] = {}

    def start(self) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  it lives as long as the process that writes to it
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, **self._environment},
            start_new_session=True,  # so that it is stopped with all the processes that it starts
        )
        self.facts = self._answer()
        self._signal(signal.SIGSTOP)

    def sample(self, case: Case) -> float:
        assert self._process is not None and self._process.stdin is not None, "started before it is asked"
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(f"{case.name}\n")
            self._process.stdin.flush()
            return self._answer()["tokens_per_second"]
        except BrokenPipeError as error:
            raise EngineError(self._last_words()) from error
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise EngineError(self._last_words())

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = [line.strip() for line in self._said if line.strip()]
        return " | ".join(lines[-3:])[-400:]

    def _signal(self, number: int) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


class Program:
    """A program that is run anew for each sample. command: its words for a case; read: tokens a second, as it says."""

    def __init__(self, command: Callable[[Case], list[str]], read: Callable[[Case, str], float]) -> None:
        self._command, self._read = command, read

    def start(self) -> None:
        """Nothing to load beforehand."""

    def sample(self, case: Case) -> float:
        words = self._command(case)
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS_PER_SAMPLE, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineError(str(error)) from error
        if done.returncode != 0:
            raise EngineError(done.stderr[-400:])
        return self._read(case, done.stdout)

    def close(self) -> None:
        """Nothing is held."""
