"""What engines keep of their speed beside a foreign process that keeps one of the processors busy.

    python benchmarks/peers/neighbour.py A --models MODELS --gguf GGUF --peers PEERS [--rounds 5]
        [--engines moesaic,llama.cpp] [--variants "4-bit;Q4_0"] [--case "decode 1"] [--json FILE]

In each round each engine is sampled alone and beside the foreign process; which comes first changes by turns. The
process counts in a loop on the first processor and has no other right to it than its share. llama.cpp's programs load
their model beside it, too, which is not in their samples.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contender import Case, Contender
from run import Arena, chosen_contenders, parser_of

from moesaic.cli import output


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """A process that takes all it gets of the first processor; none where it is not wanted."""
    if not busy:
        yield
        return
    first = min(os.sched_getaffinity(0))
    words = f"import os\nos.sched_setaffinity(0, {{{first}}})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", words]) as process:
        try:
            yield
        finally:
            process.kill()


def measure(contenders: Sequence[Contender], case: Case, rounds: int, arena: Arena) -> list[dict[str, Any]]:
    """All samples, in the order in which they were taken."""
    samples = []
    for number in range(rounds):
        for contender in contenders:
            for busy in (number % 2 == 1, number % 2 == 0):
                if not arena.prepare(contender):
                    continue
                with neighbour(busy):
                    speed = arena.sample(contender, case)
                if speed is not None:
                    samples.append({"name": contender.name, "busy": busy, "round": number, "tokens_per_second": speed})
                    output.talk(f"{contender.name}, {'beside it' if busy else 'alone'}: {speed:.1f} tokens/s")
    return samples


def kept(samples: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Medians of one engine, and of its rounds' shares that were kept."""
    speeds = {(each["round"], each["busy"]): each["tokens_per_second"] for each in samples if each["name"] == name}
    pairs = [(speeds[n, False], speeds[n, True]) for n, busy in speeds if busy and (n, False) in speeds]
    return {
        "name": name,
        "alone": statistics.median(alone for alone, _ in pairs),
        "beside": statistics.median(beside for _, beside in pairs),
        "kept": statistics.median(beside / alone for alone, beside in pairs),
    }


def main() -> None:
    """Take the samples, and print a table."""
    words = "Engines beside a busy foreign process."
    parser = parser_of(words, engines="moesaic,llama.cpp", variants="4-bit;Q4_0")
    parser.add_argument("--case", default="decode 1", help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    options = parser.parse_args()
    contenders = chosen_contenders(options)
    arena = Arena()
    try:
        samples = measure(contenders, Case.named(options.case), options.rounds, arena)
    finally:
        arena.close()
    for name, why in arena.failed.items():
        output.talk(f"{name} failed: {why}")
    whole = {name for name in (each["name"] for each in samples) if name not in arena.failed}
    rows = [kept(samples, contender.name) for contender in contenders if contender.name in whole]
    cells = [[row["name"], f"{row['alone']:.1f}", f"{row['beside']:.1f}", f"{row['kept']:.0%}"] for row in rows]
    output.table(("engine", "alone", "beside it", "kept"), cells, f"{options.case}, tokens a second: medians")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "samples": samples}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
