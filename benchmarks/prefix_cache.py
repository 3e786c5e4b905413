"""What the prefix cache saves: requests with a long beginning in common, all at once, and when their first token comes.

Three ways in turns: nothing shared; shared, with an empty cache (one request computes the prefix, the others wait for
it); shared, when an earlier request has left it. Medians over turns of the mean and the 95th percentile over requests.
Tokens must be the same each way, and logits too: afterwards every fourth hit is run again without, bits are compared.
Wanted: a mean five times shorter than with nothing shared.

    python benchmarks/prefix_cache.py [--model FOLDER] [--requests 50] [--prefix 1000] [--own 24] [--rounds 3] [--json]
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from served_model import add_arguments, engine_and_decode, prompt

from moesaic.engine.engine import Engine
from moesaic.serve.loop.loop import Loop
from moesaic.serve.loop.settings import LoopSettings
from moesaic.serve.request import Finished, Heard, Progress, Request
from moesaic.serve.seen import Stats

WANTED = 5.0
VERIFIED = 0.25  # of the hits: each takes as long as a request with nothing shared


class Asked(NamedTuple):
    """Seconds to the first token of each request, the tokens of each, and the loop's figures at the end."""

    first_s: list[float]
    tokens: list[list[int]]
    stats: Stats


class Hearing:
    """When each request heard of its first token, and all its tokens."""

    def __init__(self) -> None:
        self.first: dict[int, float] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.changed = threading.Condition()

    def __call__(self, heard: Sequence[Heard]) -> None:
        now = time.perf_counter()
        with self.changed:
            for number, event in heard:
                if isinstance(event, Progress):
                    self.first.setdefault(number, now)
                    self.tokens.setdefault(number, []).extend(info.token_id for info in event.tokens)
                elif isinstance(event, Finished):
                    self.ended.add(number)
            self.changed.notify_all()

    def wait(self, numbers: Sequence[int]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.ended.issuperset(numbers))


def ask(engine: Engine, decode, requests: Sequence[Request], settings: LoopSettings, first: Request | None) -> Asked:
    """All requests at once. first: one that runs before, and is not counted."""
    hearing = Hearing()
    loop = Loop(engine, decode, hearing, settings=settings)
    if first is not None:
        hearing.wait([loop.submit(first)])
    started = time.perf_counter()
    numbers = [loop.submit(request) for request in requests]
    hearing.wait(numbers)
    if settings.verify_hits:
        while loop.stats().verified < int(loop.stats().hits * settings.verify_hits):
            time.sleep(0.05)
    stats = loop.stats()
    loop.close()
    return Asked([hearing.first[number] - started for number in numbers], [hearing.tokens[n] for n in numbers], stats)


def percentile_95(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, round(0.95 * len(values)))]


def measure(engine: Engine, decode, args: argparse.Namespace) -> dict[str, Any]:
    """Each way's seconds to the first token; whether all wrote the same."""
    vocab = engine.config.vocab_size
    prefix = prompt(args.prefix, 0, vocab)
    asked = [
        Request(prompt_ids=prefix + prompt(args.own, 1 + number, vocab), max_new_tokens=args.tokens)
        for number in range(args.requests)
    ]
    before = Request(prompt_ids=(*prefix, 1), max_new_tokens=1)
    cache_tokens = (args.requests + 1) * (args.prefix + args.own + args.tokens + 32)
    apart = LoopSettings(cache_tokens=cache_tokens, share_prefixes=False)
    shared, verified = (LoopSettings(cache_tokens=cache_tokens, verify_hits=rate) for rate in (0.0, VERIFIED))
    ways = {"nothing shared": (apart, None), "shared": (shared, None), "left by another": (shared, before)}
    turns: dict[str, list[Asked]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way, (settings, first) in ways.items():
            turns[way].append(ask(engine, decode, asked, settings, first))
    wanted = turns["nothing shared"][0].tokens
    means = {way: statistics.median(statistics.mean(each.first_s) for each in found) for way, found in turns.items()}
    stats = ask(engine, decode, asked, verified, None).stats
    return {
        "mean_s": means,
        "p95_s": {
            way: statistics.median(percentile_95(each.first_s) for each in found) for way, found in turns.items()
        },
        "times_shorter": means["nothing shared"] / means["shared"],
        "times_shorter_when_left": means["nothing shared"] / means["left by another"],
        "same_tokens": all(each.tokens == wanted for found in turns.values() for each in found),
        "hits_verified": stats.verified,
        "hits_with_other_bits": stats.mismatches,
    }


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--prefix", type=int, default=1000)
    parser.add_argument("--own", type=int, default=24, help="tokens of each prompt that no other has")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    engine, decode = engine_and_decode(args)
    found = measure(engine, decode, args)
    if args.json:
        print(json.dumps(found))
        return
    print(f"time to the first token of {args.requests} requests at once, {args.prefix} tokens in common")
    for way, mean in found["mean_s"].items():
        print(f"{way:16s} mean {mean:8.3f} s   p95 {found['p95_s'][way]:8.3f} s")
    print(f"{found['times_shorter']:.1f} times shorter, {found['times_shorter_when_left']:.1f} when left by another")
    print(f"tokens {'the same' if found['same_tokens'] else 'NOT the same'}; ", end="")
    print(f"{found['hits_verified']} hits run again, {found['hits_with_other_bits']} with other bits")


if __name__ == "__main__":
    main()
