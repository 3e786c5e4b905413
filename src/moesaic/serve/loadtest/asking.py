"""One client of a load test: asks, reads the answer as it is streamed, and times it."""

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from moesaic.errors import ConfigError, MoesaicError
from moesaic.serve.loadtest.workload import WORDS, Planned

_FEW = (10, 40)  # words that are sent to measure them
_KINDS = ((httpx.TimeoutException, "timeout"), (httpx.ConnectError, "no connection"), (httpx.HTTPError, "broken off"))


class LoadTestError(MoesaicError):
    """A server that cannot be tested."""


@dataclass
class Asked:
    """A request and what came of it. Times are seconds after the test's start; gaps_s: between pieces of the answer.

    error: in a word or a status, None for a whole answer; "left": its client went away, as it was to.
    """

    started_s: float
    first_s: float | None = None
    ended_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    retry_after_s: float | None = None


class Server:
    """Where requests go. url: with or without /v1. fields: put into every request; those that are None are left out."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        chat: bool = False,
        key: str | None = None,
        fields: Mapping[str, Any] | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        base = url.rstrip("/").removesuffix("/v1")
        if not base.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no address; give one such as http://127.0.0.1:8000")
        self.model, self.chat = model, chat
        self.fields = {"temperature": 0, "ignore_eos": True, **(fields or {})}
        # No limit of connections here: the workload sets how many requests run at once.
        self.http = httpx.AsyncClient(
            base_url=f"{base}/v1",
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def close(self) -> None:
        await self.http.aclose()

    async def measure_words(self) -> float:
        """Tokens of a word in this server's vocabulary, by one small request, which also finds the model.

        Raises LoadTestError for a server that does not answer as it should.
        """
        try:
            if self.model is None:
                self.model = _checked(await self.http.get("/models"))["data"][0]["id"]
            # Twice, of two lengths: what a template adds is in both.
            counts = [await self._count(WORDS[:few]) for few in _FEW]
        except httpx.HTTPError as error:
            raise LoadTestError(f"{self.http.base_url} does not answer ({_kind(error)}); is it running?") from error
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise LoadTestError(
                f"{self.http.base_url} does not answer as OpenAI's protocol has it: {error!r}"
            ) from error
        return max(0.25, (counts[1] - counts[0]) / (_FEW[1] - _FEW[0]))

    async def ask(self, request: Planned, start: float) -> Asked:
        """Send a request and read its answer. start: of the test, by `time.perf_counter`. Raises nothing."""
        asked = Asked(time.perf_counter() - start)
        body = self._body(request.prompt, request.output_tokens) | {
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self.http.stream("POST", self._path, json=body) as answer:
                if answer.status_code != 200:
                    asked.error = str(answer.status_code)
                    asked.retry_after_s = _seconds(answer.headers.get("retry-after"))
                else:
                    asked.error = await _read(answer, asked, start, request.leaves_after)
        except httpx.HTTPError as error:
            asked.error = _kind(error)
        except (ValueError, KeyError, TypeError, AttributeError):
            asked.error = "not the protocol"
        asked.ended_s = time.perf_counter() - start
        return asked

    @property
    def _path(self) -> str:
        return "/chat/completions" if self.chat else "/completions"

    def _body(self, prompt: str, output_tokens: int) -> dict[str, Any]:
        asks = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        fields = {name: value for name, value in self.fields.items() if value is not None}
        return {"model": self.model, **asks, "max_tokens": output_tokens, **fields}

    async def _count(self, words: Sequence[str]) -> int:
        answer = await self.http.post(self._path, json=self._body(" ".join(words), 1))
        return _checked(answer)["usage"]["prompt_tokens"]


async def _read(answer: httpx.Response, asked: Asked, start: float, leaves_after: int | None) -> str | None:
    """Read a stream to its end; what went wrong, if anything did."""
    newest, pieces = None, 0
    async for line in _lines(answer):
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return None
        chunk = json.loads(data)
        if "error" in chunk:
            return "error in the stream"
        if usage := chunk.get("usage"):
            _add_usage(asked, usage)
        if not _has_text(chunk):
            continue
        now = time.perf_counter() - start
        if newest is None:
            asked.first_s = now
        else:
            asked.gaps_s.append(now - newest)
        newest, pieces = now, pieces + 1
        if leaves_after is not None and pieces >= leaves_after:
            return "left"
    return "unfinished"


async def _lines(answer: httpx.Response) -> AsyncIterator[bytes]:
    """As they are sent: decoding them first takes processors that the server may be on, too."""
    left = b""
    async for part in answer.aiter_bytes():
        *lines, left = (left + part).split(b"\n")
        for line in lines:
            yield line
    if left:
        yield left


def _has_text(chunk: dict[str, Any]) -> bool:
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            return True
    return False


def _add_usage(asked: Asked, usage: dict[str, Any]) -> None:
    asked.prompt_tokens, asked.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    asked.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _checked(answer: httpx.Response) -> Any:
    if answer.status_code != 200:
        words = " ".join(answer.text.split())[:200]
        raise LoadTestError(f"{answer.request.url} answers {answer.status_code}: {words}")
    return answer.json()


def _kind(error: httpx.HTTPError) -> str:
    return next(word for kind, word in _KINDS if isinstance(error, kind))


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdigit() else None
