"""Tokens a second of servers under load, ours, llama.cpp's and vLLM's, taking turns.

    python benchmarks/serving.py MODEL --gguf MODEL-Q4_0.gguf --llama-server PATH [--rounds 5] [--json FILE]
        [--peers PEERS --vllm MODEL[,MODEL-4bit]] [--clients 1,8,16,32] [--lengths 64:64,512:64,64:128,512:128]
        [--other NAME=http://127.0.0.1:8001]

For each number of clients llama-server is started anew, with as many places; one server is loaded at a time, while the
rest are stopped (SIGSTOP). In each round each server gets the same prompts, which no earlier round had; no round begins
once its lengths have had --minutes. Long requests come in fewer turns: three of each client up to 128 tokens, two up to
192, else one. Clients wait for their answers, answers have exactly the length that was asked (greedy, without an end),
and come as a stream. Printed: medians over the rounds of output tokens a second and of the 95th percentile of the time
to the first token, and ours over the best other's.
"""

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from servers import ServerProcess, load, moesaic, vllm

from moesaic.cli import output

MOST_TURNS, TOKENS_OF_A_CLIENT = 3, 384
LEAST_REQUESTS = 6


class Lengths(NamedTuple):
    """Tokens of a prompt and of its answer."""

    prompt: int
    answer: int

    def requests(self, clients: int) -> int:
        """How many of them make a sample."""
        turns = max(1, min(MOST_TURNS, TOKENS_OF_A_CLIENT // sum(self)))
        return max(LEAST_REQUESTS, turns * clients)


class Other:
    """A server that somebody else has started."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url

    def rest(self) -> None: ...
    def go(self) -> None: ...
    def stop(self) -> None: ...


Contender = ServerProcess | Other


def main() -> None:
    """Measure, and print a table."""
    args = parser_of(__doc__).parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by the way on which servers that rest are ended
    samples: list[dict[str, Any]] = []
    lengths = [Lengths(*map(int, word.split(":"))) for word in args.lengths.split(",")]
    counts = list(map(int, args.clients.split(",")))
    minutes = args.minutes / len(counts)
    context = max(sum(each) for each in lengths)
    lasting: list[Contender] = []
    try:
        start_lasting(args, context, lasting)
        for clients in counts:
            others: list[Contender] = []
            try:
                start_llama(args, clients, context, others)
                samples += measure([*lasting, *others], clients, lengths, args.rounds, 60 * minutes)
            finally:
                stop(others)
    finally:
        stop(lasting)
    rows = summarize(samples)
    show(rows)
    if args.json:
        args.json.write_text(json.dumps({"samples": samples, "medians": rows}, indent=1))


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With the servers and the cases."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint folder in bf16")
    parser.add_argument("--ours", default="4,bf16", help="ways to pack it: 4, 8, bf16 (%(default)s)")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--llama-server", type=Path, help="its llama-server")
    parser.add_argument("--flash-attention", default="on,off", help="of llama-server, each a contender (%(default)s)")
    parser.add_argument("--peers", type=Path, help="what benchmarks/peers/install.py wrote, for vLLM")
    parser.add_argument("--vllm", default="", help="checkpoint folders that it serves, comma-separated")
    parser.add_argument("--vllm-engines", default="vllm", help="vllm, vllm+zentorch, each a contender (%(default)s)")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=URL", help="a server that runs already")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", default="1,8,16,32")
    parser.add_argument("--lengths", default="64:64,512:64,64:128,512:128", help="prompt:answer, tokens")
    parser.add_argument("--rounds", type=int, default=5, help="at the most (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="for each lengths; one round in any case (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def start_lasting(args: argparse.Namespace, context: int, found: list[Contender]) -> None:
    """Ours and vLLM's, at rest, added one by one: what has started is to be ended whatever becomes of the next."""
    threads = str(args.threads)
    for way in args.ours.split(","):
        bits = [] if way == "bf16" else ["--bits", way]
        found.append(moesaic(f"moesaic {way}", args.model, *bits, "--threads", threads, "--max-running", "32"))
        found[-1].rest()
    for model in filter(None, args.vllm.split(",")):
        for engine in args.vllm_engines.split(","):
            name, zentorch = f"{engine} {Path(model).name}", engine.endswith("zentorch")
            found.append(vllm(name, args.peers, model, args.threads, context=context + 64, zentorch=zentorch))
            found[-1].rest()
    found.extend(Other(*word.split("=", 1)) for word in args.other)


def start_llama(args: argparse.Namespace, clients: int, context: int, found: list[Contender]) -> None:
    """llama-server in every way, at rest, likewise."""
    if args.gguf is None:
        return
    threads = str(args.threads)
    room = str(clients * (context + 64))  # a slot holds a whole request
    command = [str(args.llama_server), "-m", str(args.gguf), "--port", "{port}", "-t", threads, "-tb", threads]
    command += ["--parallel", str(clients), "-c", room, "-cb", "-b", "2048", "-ub", "512"]
    for flash in args.flash_attention.split(","):
        name = f"llama.cpp {args.gguf.stem.rpartition('-')[2]}, flash attention {flash}"
        found.append(ServerProcess(name, [*command, "-fa", flash]))
        found[-1].rest()


def stop(contenders: Sequence[Contender]) -> None:
    for each in contenders:
        each.stop()


def measure(
    contenders: Sequence[Contender], clients: int, lengths: Sequence[Lengths], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """One sample of each server for each case and round; who begins changes. seconds: for each of the lengths."""
    samples, spent = [], dict.fromkeys(lengths, 0.0)
    for turn in range(rounds):
        for length in lengths:
            if spent[length] >= seconds:
                continue
            began = time.monotonic()
            for each in (*contenders[turn % len(contenders) :], *contenders[: turn % len(contenders)]):
                samples.append(sample(each, clients, length, turn))
            spent[length] += time.monotonic() - began
    return samples


def sample(contender: Contender, clients: int, length: Lengths, turn: int) -> dict[str, Any]:
    """One server under one load."""
    options = {
        "--concurrency": clients,
        "--requests": length.requests(clients),
        "--prompt-tokens": length.prompt,
        "--output-tokens": length.answer,
        "--seed": 1000 * turn + clients,
    }
    contender.go()
    found = load(contender.url, *(str(word) for pair in options.items() for word in pair))
    contender.rest()
    case = {"server": contender.name, "clients": clients, "prompt": length.prompt, "answer": length.answer}
    first = found["first_token_s"]["p95"] or float("nan")
    output.talk(f"{case}: {found['output_tokens_per_s']:.1f} tokens/s, first p95 {first:.2f} s, {found['errors']}")
    return case | {"round": turn, **found}


def summarize(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of each case and server, and ours over the best of the others."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for sample in samples:
        case = (sample["clients"], sample["prompt"], sample["answer"], sample["server"])
        groups.setdefault(case, []).append(sample)
    rows = []
    for (clients, prompt, answer, server), group in groups.items():
        rows.append(
            {
                "clients": clients,
                "prompt": prompt,
                "answer": answer,
                "server": server,
                "tokens_per_s": statistics.median(each["output_tokens_per_s"] for each in group),
                "first_p95_s": statistics.median(each["first_token_s"]["p95"] or float("nan") for each in group),
                "inter_token_p50_s": statistics.median(each["inter_token_s"]["p50"] or float("nan") for each in group),
                "errors": sum(sum(each["errors"].values()) for each in group),
            }
        )
    for row in rows:
        peers = [
            each
            for each in rows
            if each["server"].split()[0] != "moesaic"
            and (each["clients"], each["prompt"], each["answer"]) == (row["clients"], row["prompt"], row["answer"])
        ]
        if peers and row["server"].startswith("moesaic"):
            row["speed_ratio"] = row["tokens_per_s"] / max(each["tokens_per_s"] for each in peers)
            row["first_ratio"] = row["first_p95_s"] / min(each["first_p95_s"] for each in peers)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    columns = ("clients", "prompt", "answer", "server", "tokens/s", "first p95", "between", "errors", "speed", "first")
    output.table(columns, [_cells(row) for row in rows], "speed and first: over the best other's")


def _cells(row: dict[str, Any]) -> list[str]:
    ratios = [f"{row[name]:.2f}" if name in row else "-" for name in ("speed_ratio", "first_ratio")]
    return [
        *(str(row[name]) for name in ("clients", "prompt", "answer", "server")),
        f"{row['tokens_per_s']:.1f}",
        f"{row['first_p95_s']:.3f} s",
        f"{row['inter_token_p50_s'] * 1e3:.1f} ms",
        str(row["errors"]),
        *ratios,
    ]


if __name__ == "__main__":
    main()
