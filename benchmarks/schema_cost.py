"""What a JSON schema costs for each token: the same number of tokens written by one and freely, taking turns.

    python benchmarks/schema_cost.py [--model FOLDER] [--batches 1 8] [--tokens 32] [--seconds 120] [--json]

The schemas are never fulfilled before the texts are as long as is asked for, so that both ways write equally many
tokens; all are drawn at temperature 1. In each round the schemas come in drawn order, each run between two free ones,
and counts over their mean (see paired.py for the interval); rounds go on for --seconds at each batch, at least four. Of
each run the mean time of the steps in which all texts are written is taken. "own": what is done outside the engine's
steps, over these, by medians: without noise. Wanted: 5 % at most.
"""

import argparse
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from paired import cost, interval, verdict
from served_model import add_arguments, engine_and_decode, prompt

from moesaic.data.tokenizer import Tokenizer
from moesaic.engine.engine import Engine
from moesaic.engine.sampling import Sampling
from moesaic.serve.choice.guidance import Guidance
from moesaic.serve.loop.runner import Runner
from moesaic.serve.loop.settings import LoopSettings
from moesaic.serve.request import Finished, Grammar, Request

PROMPT_TOKENS, CACHE_TOKENS = 32, 16_384
LEAST_ROUNDS, MOST_COST = 4, 0.05
FREE = "free"
_ENDLESS = {"type": "array", "minItems": 100_000}
SCHEMAS: dict[str, dict[str, Any]] = {
    "strings": {**_ENDLESS, "items": {"type": "string"}},
    "numbers": {**_ENDLESS, "items": {"type": "number"}},
    "records": {
        **_ENDLESS,
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 40},
                "kind": {"enum": ["red", "green", "blue"]},
                "size": {"type": "integer", "minimum": 0, "maximum": 4000},
                "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
            },
            "required": ["name", "kind", "size", "tags"],
            "additionalProperties": False,
        },
    },
}


class Ran(NamedTuple):
    """The mean seconds of a step, and the share of what is outside the engine."""

    step_s: float
    own: float


def run(engine: Engine, guidance: Guidance, way: str, batch: int, num_tokens: int, seed: int) -> Ran:
    """All texts together; the steps in which each gets a token."""
    grammar = None if way == FREE else Grammar("json_schema", json.dumps(SCHEMAS[way]))
    settings = LoopSettings(cache_tokens=CACHE_TOKENS, share_prefixes=False)
    runner = Runner(engine, lambda ids: "", settings, guidance=guidance)
    for number in range(1, batch + 1):
        request = Request(
            prompt_ids=prompt(PROMPT_TOKENS, 100 * seed + number, engine.config.vocab_size),
            max_new_tokens=num_tokens,
            sampling=Sampling(temperature=1.0, seed=seed),
            grammar=grammar,
        )
        runner.add(number, runner.writing(request))
    while not all(running.writing.num_new for running in runner.running.values()):
        runner.step()
    times, engine_s = [], runner.stepping.engine_s
    while len(runner.running) == batch:
        began = time.perf_counter()
        runner.step()
        times.append(time.perf_counter() - began)
    engine_s = runner.stepping.engine_s - engine_s
    ends = [event for _, event in runner.take_heard() if isinstance(event, Finished)]
    assert all(each.reason == "length" for each in ends), f"a text has ended early: {ends}"
    return Ran(statistics.mean(times), (sum(times) - engine_s) / engine_s)


def measure(engine: Engine, guidance: Guidance, batch: int, num_tokens: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each schema."""
    chance, turn = random.Random(0), 0
    found: dict[str, list[Ran]] = {way: [] for way in (FREE, *SCHEMAS)}
    ratios: dict[str, list[float]] = {schema: [] for schema in SCHEMAS}
    for schema in SCHEMAS:  # which compiles it
        run(engine, guidance, schema, batch, num_tokens, turn)
    began = time.perf_counter()
    while turn < LEAST_ROUNDS or time.perf_counter() - began < seconds:
        turn += 1
        before = run(engine, guidance, FREE, batch, num_tokens, turn)
        for schema in chance.sample(list(SCHEMAS), len(SCHEMAS)):
            guided = run(engine, guidance, schema, batch, num_tokens, turn)
            after = run(engine, guidance, FREE, batch, num_tokens, turn)
            ratios[schema].append(guided.step_s / math.sqrt(before.step_s * after.step_s))
            found[schema].append(guided)
            found[FREE].append(after)
            before = after
    return [
        {
            "batch": batch,
            "schema": schema,
            "rounds": turn,
            "free_s": statistics.median(each.step_s for each in found[FREE]),
            "guided_s": statistics.median(each.step_s for each in found[schema]),
            **cost(ratios[schema]),
            "free_own": statistics.median(each.own for each in found[FREE]),
            "guided_own": statistics.median(each.own for each in found[schema]),
        }
        for schema in SCHEMAS
    ]


def main() -> None:
    """Measure each batch, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120, help="for each batch (%(default)s)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    engine, _ = engine_and_decode(args)
    engine.reserve(CACHE_TOKENS)
    guidance = Guidance(Tokenizer.load(Path(args.model)), engine.config.vocab_size)
    try:
        rows = [row for batch in args.batches for row in measure(engine, guidance, batch, args.tokens, args.seconds)]
    finally:
        guidance.close()
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'batch':>5} {'schema':>8} {'rounds':>6} {'free ms':>8} {'guided':>8} {'own':>6} {'guided':>6}  slower")
    for row in rows:
        print(
            f"{row['batch']:5d} {row['schema']:>8} {row['rounds']:6d} {row['free_s'] * 1e3:8.2f} "
            f"{row['guided_s'] * 1e3:8.2f} {row['free_own']:6.1%} {row['guided_own']:6.1%}  {interval(row)}, "
            f"at most {MOST_COST:.0%}: {verdict(row, MOST_COST)}"
        )


if __name__ == "__main__":
    main()
