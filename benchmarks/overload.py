"""A server under ten times the load that it can bear, with clients that vanish, told to end in the middle.

    python benchmarks/overload.py MODEL [--bits 4] [--times 10] [--seconds 120] [--json]

First the sustainable rate is measured. Then requests come at so many times that rate, a tenth of the clients leave
before their answer ends, and after half the time the server gets SIGTERM. Wanted: every request that was accepted ends
as it should, every other one is refused (429 or 503, with Retry-After; no connection once the server has ended),
nothing hangs, and the server ends by itself, with exit code 0, within its time to drain.
"""

import argparse
import asyncio
import json
import signal
import sys
import time
from collections import Counter
from typing import Any

from servers import ServerProcess, load, moesaic

from moesaic.serve.loadtest.asking import Asked, Server
from moesaic.serve.loadtest.driving import Progress, drive
from moesaic.serve.loadtest.workload import Workload

DRAIN_S = 30.0
LAST_WORDS_S = 10.0
CLEAN = {"429", "503", "left"}


def main() -> None:
    """Drive the load, and say what was not as it should be."""
    args = parser_of(__doc__).parse_args()
    bits = ["--bits", str(args.bits)] if args.bits else []
    server = moesaic("moesaic", args.model, *bits, "--queue", str(args.queue), "--drain-seconds", str(DRAIN_S))
    try:
        lengths = ("--prompt-tokens", "64", "--output-tokens", "64")
        rate = load(server.url, "--concurrency", "32", "--duration", str(args.warm_seconds), *lengths)["requests_per_s"]
        before = server.memory_bytes()
        result = asyncio.run(overload(server, args.times * rate, args.seconds))
    finally:
        server.stop()
    result |= {"sustainable_per_s": rate, "rate_per_s": args.times * rate, "memory_before_bytes": before}
    print(json.dumps(result) if args.json else "\n".join(f"{name}: {value}" for name, value in result.items()))
    if result["wrong"]:
        sys.exit(1)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With the model and the load."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, choices=(4, 8))
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--warm-seconds", type=float, default=20.0)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    return parser


async def overload(server: ServerProcess, rate: float, seconds: float) -> dict[str, Any]:
    """Load the server, end it in the middle, and look at every answer."""
    workload = Workload(rate=rate, seconds=seconds, prompt_tokens=64, output_tokens=64, leave=0.1, seed=1)
    client, progress = Server(server.url), Progress()
    driving = asyncio.ensure_future(drive(client, workload, progress))
    await asyncio.sleep(seconds / 2)
    memory = server.memory_bytes()
    told_s = progress.seconds
    server.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    exit_code = await asyncio.to_thread(server.process.wait, DRAIN_S + LAST_WORDS_S)
    drain_s = time.monotonic() - began
    asked = await driving
    await client.close()
    wrong = [f"exit code {exit_code}"] if exit_code else []
    wrong += [f"draining took {drain_s:.1f} s"] if drain_s > DRAIN_S + LAST_WORDS_S else []
    wrong += [f"{count} x {kind}" for kind, count in _unclean(asked, told_s).items()]
    without = sum(each.error in ("429", "503") and each.retry_after_s is None for each in asked)
    wrong += [f"{without} refusals without Retry-After"] if without else []
    return {
        "answers": dict(Counter(each.error or "answered" for each in asked)),
        "drain_s": round(drain_s, 2),
        "memory_under_load_bytes": memory,
        "wrong": wrong,
    }


def _unclean(asked: list[Asked], told_s: float) -> Counter[str]:
    """What neither was answered nor refused cleanly. A connection may be closed before anything of an answer has come
    once the server has been told to end."""
    return Counter(
        each.error
        for each in asked
        if each.error is not None
        and each.error not in CLEAN
        and not (each.error in ("no connection", "broken off") and each.first_s is None and each.ended_s > told_s)
    )


if __name__ == "__main__":
    main()
