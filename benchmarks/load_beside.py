"""What users of one model feel while the server loads another beside it.

    python benchmarks/load_beside.py MODEL OTHER [--bits 4] [--clients 8] [--rounds 3] [--json]

A server with MODEL is asked by clients that wait for their answers, in spells of --seconds: while OTHER is loaded, over
and over again (and unloaded in between), and as often without, before and after. Printed: the 99th percentile of the
time between tokens in the worst of the spells of each kind, as how many prompts happen to come together decides much of
a spell's, and the ratio of the two; and that of the medians of spells.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from servers import ServerProcess, load

from moesaic.cli import output

WANTED = 2.0
TOML = """
load_models = true
[models.one]
path = "{one}"
{bits}
[models.two]
path = "{two}"
at_start = false
{bits}
"""


def main() -> None:
    """Measure both in turns, and print their ratio."""
    args = parser_of(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "serve.toml"
        bits = f"bits = {args.bits}" if args.bits else ""
        settings.write_text(TOML.format(one=args.model, two=args.other, bits=bits))
        command = [sys.executable, "-m", "moesaic", "serve", "--config", str(settings), "--port", "{port}"]
        server = ServerProcess("moesaic", [*command, "--log-format", "none"], ready="/ready")
        try:
            rounds = [measure(server, args) for _ in range(args.rounds)]
        finally:
            server.stop()
    result = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    result["ratio"] = result["loading_p99_s"] / result["alone_p99_s"]
    result["median_ratio"] = result["loading_median_s"] / result["alone_median_s"]
    if args.json:
        print(json.dumps({"rounds": rounds, **result}))
        return
    alone, loading = (result[name] * 1e3 for name in ("alone_p99_s", "loading_p99_s"))
    print(f"p99 between tokens: {alone:.1f} ms alone, {loading:.1f} ms while another model loads, which took")
    print(f"{output.duration(result['load_s'])}; ratio {result['ratio']:.2f} (wanted: {WANTED} or less)")
    print(
        f"these are of the worst of {result['spells']:.0f} spells each; of the medians the ratio is "
        f"{result['median_ratio']:.2f}"
    )


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With the models and the load."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("other")
    parser.add_argument("--bits", type=int, choices=(4, 8))
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0, help="of load without loading (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    return parser


def measure(server: ServerProcess, args: argparse.Namespace) -> dict[str, float]:
    """One round: alone, while the other model is loaded, alone."""
    alone = [_load(server.url, args.clients, args.seconds)]
    found: dict[str, Any] = {}
    stop = time.monotonic() + args.seconds

    def load_again() -> None:
        times = []
        while not times or time.monotonic() < stop:
            began = time.monotonic()
            _post(server.url, "load")
            times.append(time.monotonic() - began)
            _post(server.url, "unload")
        found["load_s"] = statistics.median(times)

    loading = threading.Thread(target=load_again)
    loading.start()
    beside = [_load(server.url, args.clients, args.seconds)]
    while loading.is_alive():
        beside.append(_load(server.url, args.clients, args.seconds))
    loading.join()
    while len(alone) < len(beside):
        alone.append(_load(server.url, args.clients, args.seconds))
    alone_s, beside_s = ([each["inter_token_s"]["p99"] for each in spells] for spells in (alone, beside))
    return {
        "alone_p99_s": max(alone_s),
        "loading_p99_s": max(beside_s),
        "alone_median_s": statistics.median(alone_s),
        "loading_median_s": statistics.median(beside_s),
        "spells": len(beside),
        "alone_tokens_per_s": statistics.median(each["output_tokens_per_s"] for each in alone),
        "loading_tokens_per_s": statistics.median(each["output_tokens_per_s"] for each in beside),
        "load_s": found["load_s"],
    }


def _load(url: str, clients: int, seconds: float) -> dict[str, Any]:
    options = ("--model", "one", "--concurrency", str(clients), "--duration", str(seconds))
    return load(url, *options, "--prompt-tokens", "64", "--output-tokens", "64", "--seed", str(time.time_ns() % 10**6))


def _post(url: str, what: str) -> None:
    body = json.dumps({"model": "two"}).encode()
    request = urllib.request.Request(f"{url}/v1/models/{what}", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=3600):
        pass


if __name__ == "__main__":
    main()
