"""10,000 bad requests to a server, and what becomes of it.

    python benchmarks/fuzz_server.py MODEL [--cases 10000] [--seed 0] [--json]

Half of them by our own OpenAPI document (schemathesis; half of these as they should be), the rest below it: truncated
and mutated bodies, deep JSON, huge numbers, broken UTF-8, strange heads, clients that vanish, slow clients. Wanted:
nothing is answered with a 5xx, nothing hangs, memory stays within 2 % of what it was after the first third, and good
requests are answered in between and afterwards as they were before.
"""

import argparse
import json
import sys
import time
from typing import Any

from fuzzing import Findings, good_text, raw_cases, schema_cases, slow_clients
from servers import ServerProcess, moesaic

from moesaic.cli import output

GROWTH = 0.02
BATCHES = 6
SLOW = 16
SETTINGS = ("limits.header_s=2", "limits.body_s=2", "limits.new_tokens=16", "limits.choices=4", "limits.timeout_s=20")


def main() -> None:
    """Send everything, and say what was not as it should be."""
    args = parser_of(__doc__).parse_args()
    options = [word for setting in SETTINGS for word in ("--set", setting)]
    server = moesaic("moesaic", args.model, "--max-length", "256", "--cache", "16384", *options)
    try:
        result = fuzz(server, args.cases, args.seed)
    finally:
        server.stop()
    print(json.dumps(result) if args.json else "\n".join(f"{name}: {value}" for name, value in result.items()))
    if result["wrong"]:
        sys.exit(1)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With the model and the number of cases."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser


def fuzz(server: ServerProcess, cases: int, seed: int) -> dict[str, Any]:
    """All cases in batches, memory and a good request after each."""
    findings, memory, wrong = Findings(), [], []
    expected, began = good_text(server.url, "model"), time.monotonic()
    for batch in range(BATCHES):
        schema_cases(server.url, cases * 6 // 10 // BATCHES, seed + batch, findings)
        slow_clients(server.url, SLOW, findings)
        raw_cases(server.url, cases * (batch + 1) // BATCHES - findings.statuses.total(), seed + batch, findings)
        if good_text(server.url, "model") != expected:
            wrong.append(f"a good request is answered otherwise after batch {batch + 1}")
        memory.append(server.memory_bytes())
        well = dict(findings.wrong) or "all well"
        output.talk(f"{findings.statuses.total()} cases, {output.size(memory[-1])}: {well}")
    settled = memory[BATCHES // 3 - 1]
    growth = memory[-1] / settled - 1
    wrong += [f"memory grew by {growth:.1%}"] if growth > GROWTH else []
    wrong += [f"{count} x {what}" for what, count in findings.wrong.items()]
    return {
        "cases": findings.statuses.total(),
        "sent": dict(sorted(findings.sent.items())),
        "statuses": dict(sorted(findings.statuses.items())),
        "memory_bytes": memory,
        "growth": round(growth, 5),
        "seconds": round(time.monotonic() - began, 1),
        "wrong": wrong,
    }


if __name__ == "__main__":
    main()
