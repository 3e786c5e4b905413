"""What serving adds to the engine's steps: the time of a step of decoding, bare, in the loop, heard from asyncio, and
heard by clients in a process of their own from a server in another, as streams of events.

All write on the same prompts at the same batch, in short blocks of steps; prompts are read once, and then found in the
cache. Which of the three comes next is drawn; each block lies between two bare ones, and counts over their mean (see
paired.py for the interval). Rounds go on for --seconds at each batch, at least four. The time of a block is from the
first step that all were heard of to the last. "own": what the loop's thread does outside the engine's steps, over
these, within the same blocks: without noise, and more than what is added, as the bare engine's tokens must be chosen,
too. "us/token": of the server's thread that talks to clients, and of the clients, by their processor time. Wanted: 5 %
at 1 and 8 requests, 12 % at 32. The tokens must be the same; of clients the texts, where the model has a tokenizer.

    python benchmarks/serving_overhead.py [--model FOLDER] [--batches 1 8 32] [--tokens 12] [--seconds 70] [--json]
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paired import cost, interval, verdict
from served_model import add_arguments, engine_and_decode, folder_of, letters, prompt
from servers import ServerProcess, moesaic

from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece, in_steps
from moesaic.engine.sampling import likeliest
from moesaic.serve.loop.desk import Desk
from moesaic.serve.loop.loop import Loop
from moesaic.serve.loop.settings import LoopSettings
from moesaic.serve.request import Finished, Heard, Progress, Request

PROMPT_TOKENS = 65  # four blocks of the cache, and a token that is run again
CACHE_TOKENS = 16_384
LEAST_ROUNDS = 4
WANTED = {1: 0.05, 8: 0.05, 32: 0.12}
CLIENTS = Path(__file__).parent / "streaming_client.py"


class Written(NamedTuple):
    """The mean seconds from step to step while all write, and what each has written."""

    step_s: float
    tokens: list[list[int]]
    texts: list[str] | None = None


class Bare:
    """Steps of the engine and the likeliest token of each row. Prompts but for their last token are read once."""

    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
        self.engine, self.prompts = engine, prompts
        self.texts = [Text() for _ in prompts]
        for pieces in in_steps([(text, list(ids[:-1])) for text, ids in zip(self.texts, prompts, strict=True)]):
            engine.step(pieces)

    def run(self, num_tokens: int) -> Written:
        """A block."""
        tokens: list[list[int]] = [[] for _ in self.prompts]
        newest, times = [ids[-1] for ids in self.prompts], []
        for _ in range(num_tokens):
            pieces = [Piece(text, [token]) for text, token in zip(self.texts, newest, strict=True)]
            newest = likeliest(self.engine.step(pieces)).tolist()
            for written, token in zip(tokens, newest, strict=True):
                written.append(token)
            times.append(time.perf_counter())
        for text, ids in zip(self.texts, self.prompts, strict=True):
            self.engine.cache.cut(text, len(ids) - 1)
        return Written(between(times), tokens)

    def close(self) -> None:
        for text in self.texts:
            self.engine.free(text)


def between(times: Sequence[float]) -> float:
    """The mean from each to the next."""
    return (times[-1] - times[0]) / (len(times) - 1)


class Hearing:
    """What is heard of requests: when all of them got a token together, and which."""

    def __init__(self, count: int) -> None:
        self.count, self.times = count, []
        self.tokens: dict[int, list[int]] = {}
        self.num_ended = 0
        self.ended = threading.Event()

    def __call__(self, heard: Sequence[Heard]) -> None:
        progress = [(number, event) for number, event in heard if isinstance(event, Progress)]
        if len(progress) == self.count:
            self.times.append(time.perf_counter())
        for number, event in progress:
            self.tokens.setdefault(number, []).extend(info.token_id for info in event.tokens)
        self.num_ended += sum(isinstance(event, Finished) for _, event in heard)
        if self.num_ended == self.count:
            self.ended.set()


class Looped:
    """Through the loop, heard in its thread."""

    def __init__(self, engine: Engine, decode: Callable[[list[int]], str]) -> None:
        self._hearing: Hearing | None = None
        self.loop = Loop(engine, decode, self._hear, settings=LoopSettings(cache_tokens=CACHE_TOKENS))
        self.own: list[float] = []

    def run(self, requests: Sequence[Request]) -> Written:
        """A block."""
        hearing = self._hearing = Hearing(len(requests))
        before = self.loop.stats()
        numbers = [self.loop.submit(request) for request in requests]
        hearing.ended.wait()
        stats = self.loop.stats()
        engine_s = stats.engine_s - before.engine_s
        self.own.append((stats.busy_s - before.busy_s - engine_s) / engine_s)
        return Written(between(hearing.times), [hearing.tokens[number] for number in numbers])

    def _hear(self, heard: Sequence[Heard]) -> None:
        if self._hearing is not None:
            self._hearing(heard)


class Desked:
    """Through the desk, each request read by a task of its own, in a thread that runs asyncio."""

    def __init__(self, engine: Engine, decode: Callable[[list[int]], str]) -> None:
        self._asyncio = asyncio.new_event_loop()
        threading.Thread(target=self._asyncio.run_forever, daemon=True).start()
        self._desk = self._wait(self._open(engine, decode))

    def run(self, requests: Sequence[Request]) -> Written:
        """A block."""
        return self._wait(self._read_all(requests))

    def close(self) -> None:
        self._wait(self._desk.close())
        self._asyncio.call_soon_threadsafe(self._asyncio.stop)

    def _wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._asyncio).result()

    async def _open(self, engine: Engine, decode: Callable[[list[int]], str]) -> Desk:
        return Desk(engine, decode, settings=LoopSettings(cache_tokens=CACHE_TOKENS))

    async def _read_all(self, requests: Sequence[Request]) -> Written:
        heard = await asyncio.gather(*map(self._read, requests))
        return Written(while_all([times for times, _ in heard]), [tokens for _, tokens in heard])

    async def _read(self, request: Request) -> tuple[list[float], list[int]]:
        times, tokens = [], []
        async for event in self._desk.run(request):
            if isinstance(event, Progress):
                tokens += [info.token_id for info in event.tokens]
                times.append(time.perf_counter())
        return times, tokens


class Streamed:
    """Through the whole server, heard by clients. server_us, client_us: processor time of a token."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        pipe = subprocess.PIPE
        self._clients = subprocess.Popen([sys.executable, CLIENTS, server.url], stdin=pipe, stdout=pipe, text=True)
        self.server_us: list[float] = []
        self.client_us: list[float] = []

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Written:
        """A block."""
        assert self._clients.stdin is not None and self._clients.stdout is not None
        asked = json.dumps({"prompts": [list(ids) for ids in prompts], "max_tokens": num_tokens})
        before = self._processor_s()
        print(asked, file=self._clients.stdin, flush=True)
        heard = json.loads(self._clients.stdout.readline())
        count = len(prompts) * num_tokens
        for kept, spent, earlier in zip((self.server_us, self.client_us), self._processor_s(), before, strict=True):
            kept.append(1e6 * (spent - earlier) / count)
        return Written(while_all([each["times"] for each in heard]), [], [each["text"] for each in heard])

    def close(self) -> None:
        self._clients.kill()
        self._clients.wait()

    def _processor_s(self) -> tuple[float, float]:
        return processor_s(self.server.process.pid), processor_s(self._clients.pid)


def processor_s(pid: int) -> float:
    """Seconds that a process's first thread has had a processor."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def while_all(times: Sequence[Sequence[float]]) -> float:
    """The mean from step to step, from the first that all have heard of to the last of who ends first.

    Where the last begins after that, as with tiny models, that of the last.
    """
    last_to_begin, first_to_end = max(times, key=lambda each: each[0]), min(times, key=lambda each: each[-1])
    shared = [last_to_begin[0], *(at for at in first_to_end if at > last_to_begin[0])]
    return between(shared if len(shared) > 1 else last_to_begin)


def serve(args: argparse.Namespace, folder: Path) -> ServerProcess:
    """The whole server, without what the bare engine has not: drafts."""
    options = ("--bits", str(args.bits), "--threads", str(args.threads), "--cache", str(CACHE_TOKENS))
    return moesaic("moesaic", str(folder), *options, "--set", "models.model.speculation=off")


def measure(
    engine: Engine, decode: Callable[[list[int]], str], server: ServerProcess, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of a bare step, and what each way adds to it."""
    prompts = [prompt(PROMPT_TOKENS, 1000 * batch + seed, engine.config.vocab_size) for seed in range(batch)]
    requests = [Request(prompt_ids=ids, max_new_tokens=args.tokens) for ids in prompts]
    bare, looped, desked, streamed = (
        Bare(engine, prompts),
        Looped(engine, decode),
        Desked(engine, decode),
        Streamed(server),
    )
    ways: dict[str, Callable[[], Written]] = {
        "loop": lambda: looped.run(requests),
        "asyncio": lambda: desked.run(requests),
        "http": lambda: streamed.run(prompts, args.tokens),
    }
    try:
        found = in_rounds(lambda: bare.run(args.tokens), ways, args.seconds, decode)
    finally:
        looped.loop.close()
        desked.close()
        streamed.close()
        bare.close()
    return {
        **found,
        "own": statistics.median(looped.own),
        "server_us": statistics.median(streamed.server_us),
        "client_us": statistics.median(streamed.client_us),
    }


def in_rounds(
    bare: Callable[[], Written], ways: dict[str, Callable[[], Written]], seconds: float, decode: Callable
) -> dict[str, Any]:
    """Rounds of blocks of all ways in drawn order, each between two bare ones."""
    chance, same = random.Random(0), True
    before = bare()
    texts = None if decode is letters else [decode(written) for written in before.tokens]
    for run in ways.values():  # which reads the prompts
        run()
    plain, ratios = [], {way: [] for way in ways}
    began = time.perf_counter()
    while len(plain) < LEAST_ROUNDS * len(ways) or time.perf_counter() - began < seconds:
        before = bare()
        for way in chance.sample(list(ways), len(ways)):
            written, after = ways[way](), bare()
            ratios[way].append(written.step_s / math.sqrt(before.step_s * after.step_s))
            plain.append(after.step_s)
            same = same and after.tokens == before.tokens
            same = same and (
                written.tokens == before.tokens if written.texts is None else texts in (None, written.texts)
            )
            before = after
    return {
        "bare_s": statistics.median(plain),
        "rounds": len(plain) // len(ways),
        "same_tokens": same,
        **{way: cost(found) for way, found in ratios.items()},
    }


def main() -> None:
    """Measure each batch, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=12, help="of a text in a block (%(default)s)")
    parser.add_argument("--seconds", type=float, default=70, help="for each batch (%(default)s)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    engine, decode = engine_and_decode(args)
    engine.reserve(CACHE_TOKENS)
    results: dict[int, dict[str, Any]] = {}
    with folder_of(args) as folder:
        server = serve(args, folder)
        try:
            for batch in args.batches:
                results[batch] = measure(engine, decode, server, batch, args)
                if not args.json:
                    print(lines(batch, results[batch]), flush=True)
        finally:
            server.stop()
    if args.json:
        print(json.dumps(results))


def lines(batch: int, found: dict[str, Any]) -> str:
    """What was found at a batch."""
    most = WANTED.get(batch)
    wanted = "" if most is None else f"; at most {most:.0%} wanted"
    ways = [
        f"  {way:8s} {interval(found[way])}" + ("" if most is None else f" {verdict(found[way], most)}")
        for way in ("loop", "asyncio", "http")
    ]
    same = "the same tokens" if found["same_tokens"] else "OTHER TOKENS"
    first = f"{batch} at once: a bare step {found['bare_s'] * 1e3:.2f} ms, {found['rounds']} rounds{wanted}; {same}"
    last = (
        f"  own {found['own']:.1%}; of processor time the server's thread for clients {found['server_us']:.0f} "
        f"us/token, the clients {found['client_us']:.0f}"
    )
    return "\n".join([first, *ways, last])


if __name__ == "__main__":
    main()
