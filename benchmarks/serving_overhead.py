"""What serving adds to the engine's steps: the time of a step of decoding, bare, in the loop, and heard from asyncio.

All three write on the same prompts at the same batch, in turns; of each turn the median time from step to step is
taken, of all turns the median, and the median of the turns' ratios to the bare engine. "own": what the loop's thread
does outside the engine's steps, over these, within the same run: steadier than the ratios, and more than them, as the
bare engine's tokens must be chosen, too. Wanted: 5 % at 1 and 8 requests, 12 % at 32. The tokens must be the same.

    python benchmarks/serving_overhead.py [--model FOLDER] [--batches 1 8 32] [--tokens 64] [--rounds 5] [--json]
"""

import argparse
import asyncio
import itertools
import json
import statistics
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from served_model import add_arguments, engine_and_decode, prompt

from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece, in_steps
from moesaic.engine.sampling import likeliest
from moesaic.serve.loop.desk import Desk
from moesaic.serve.loop.loop import Loop
from moesaic.serve.loop.settings import LoopSettings
from moesaic.serve.request import Finished, Heard, Progress, Request

PROMPT_TOKENS = 64
CACHE_TOKENS = 16_384
WANTED = {1: 0.05, 8: 0.05, 32: 0.12}


class Written(NamedTuple):
    """The median seconds from step to step while all write, the tokens of each, and what the loop took of its own."""

    step_s: float
    tokens: list[list[int]]
    own: float = 0.0


def bare(engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int) -> Written:
    """Steps of the engine and the likeliest token of each row."""
    texts, tokens = [Text() for _ in prompts], [[] for _ in prompts]
    for pieces in in_steps([(text, list(ids)) for text, ids in zip(texts, prompts, strict=True)]):
        for piece, token in zip([p for p in pieces if p.wants == "last"], newest(engine, pieces), strict=True):
            tokens[texts.index(piece.text)].append(token)
    times = [time.perf_counter()]
    for _ in range(num_tokens - 1):
        pieces = [Piece(text, written[-1:]) for text, written in zip(texts, tokens, strict=True)]
        for written, token in zip(tokens, newest(engine, pieces), strict=True):
            written.append(token)
        times.append(time.perf_counter())
    for text in texts:
        engine.free(text)
    return Written(between(times), tokens)


def newest(engine: Engine, pieces: Sequence[Piece]) -> list[int]:
    return likeliest(engine.step(pieces)).tolist()


def between(times: Sequence[float]) -> float:
    """The median from each to the next."""
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


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


def looped(engine: Engine, decode, requests: Sequence[Request]) -> Written:
    """Through the loop, heard in its thread."""
    hearing = Hearing(len(requests))
    loop = Loop(engine, decode, hearing, settings=LoopSettings(cache_tokens=CACHE_TOKENS))
    numbers = [loop.submit(request) for request in requests]
    hearing.ended.wait()
    loop.close()
    stats = loop.stats()
    own = (stats.busy_s - stats.engine_s) / stats.engine_s
    return Written(between(hearing.times), [hearing.tokens[number] for number in numbers], own)


async def desked(engine: Engine, decode, requests: Sequence[Request]) -> Written:
    """Through the desk, each request read by a task of its own."""
    desk = Desk(engine, decode, settings=LoopSettings(cache_tokens=CACHE_TOKENS))
    times: list[float] = []

    async def read(request: Request) -> list[int]:
        tokens: list[int] = []
        async for event in desk.run(request):
            if isinstance(event, Progress):
                tokens += [info.token_id for info in event.tokens]
                if request is requests[0]:
                    times.append(time.perf_counter())
        return tokens

    try:
        tokens = await asyncio.gather(*map(read, requests))
    finally:
        await desk.close()
    return Written(between(times), list(tokens))


def measure(engine: Engine, decode, batch: int, num_tokens: int, rounds: int) -> dict[str, float | bool]:
    """Seconds of a step each way, and what is added to the bare engine's."""
    vocab = engine.config.vocab_size
    prompts = [prompt(PROMPT_TOKENS, seed, vocab) for seed in range(batch)]
    requests = [Request(prompt_ids=ids, max_new_tokens=num_tokens) for ids in prompts]
    ways = {
        "bare": lambda: bare(engine, prompts, num_tokens),
        "loop": lambda: looped(engine, decode, requests),
        "asyncio": lambda: asyncio.run(desked(engine, decode, requests)),
    }
    turns: dict[str, list[float]] = {way: [] for way in ways}
    own: list[float] = []
    same = True
    for number in range(rounds + 1):
        found = {way: run() for way, run in (ways.items() if number % 2 else reversed(ways.items()))}
        same = same and all(written.tokens == found["bare"].tokens for written in found.values())
        for way, written in found.items() if number else ():
            turns[way].append(written.step_s)
            own += [written.own] if way == "loop" else []
    result: dict[str, float | bool] = {f"{way}_s": statistics.median(taken) for way, taken in turns.items()}
    result["loop_own"] = statistics.median(own)
    for way in ("loop", "asyncio"):
        ratios = [taken / plain for taken, plain in zip(turns[way], turns["bare"], strict=True)]
        result[f"{way}_overhead"] = statistics.median(ratios) - 1
    return {**result, "same_tokens": same}


def main() -> None:
    """Measure each batch, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    engine, decode = engine_and_decode(args)
    engine.reserve(CACHE_TOKENS)
    results = {batch: measure(engine, decode, batch, args.tokens, args.rounds) for batch in args.batches}
    if args.json:
        print(json.dumps(results))
        return
    print(f"{'batch':>5} {'bare ms':>9} {'loop ms':>9} {'':>7} {'asyncio ms':>10} {'':>7} {'own':>7}  wanted  tokens")
    for batch, found in results.items():
        wanted = f"{WANTED[batch]:.0%}" if batch in WANTED else ""
        print(
            f"{batch:5d} {found['bare_s'] * 1e3:9.2f} {found['loop_s'] * 1e3:9.2f} {found['loop_overhead']:+7.1%} "
            f"{found['asyncio_s'] * 1e3:10.2f} {found['asyncio_overhead']:+7.1%} "
            f"{found['loop_own']:7.1%} {wanted:>7}  "
            f"{'the same' if found['same_tokens'] else 'OTHERS'}"
        )


if __name__ == "__main__":
    main()
