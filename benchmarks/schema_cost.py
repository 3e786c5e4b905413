"""What a JSON schema costs for each token: the same number of tokens written by one and freely, taking turns.

    python benchmarks/schema_cost.py [--model FOLDER] [--batches 1 8] [--tokens 128] [--rounds 5] [--json]

The schemas are never fulfilled before the texts are as long as is asked for, so that both ways write equally many
tokens; all are drawn at temperature 1. Of each run the median time from step to step is taken while all texts are
written, and of the rounds the median ratio of a schema's to the free texts' in the same round. "own": what is done
outside the engine's steps, over these; masks are computed meanwhile. Wanted: 5 % at most.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from served_model import add_arguments, engine_and_decode, prompt

from moesaic.data.tokenizer import Tokenizer
from moesaic.engine.engine import Engine
from moesaic.engine.sampling import Sampling
from moesaic.serve.choice.guidance import Guidance
from moesaic.serve.loop.runner import Runner
from moesaic.serve.loop.settings import LoopSettings
from moesaic.serve.request import Finished, Grammar, Request

PROMPT_TOKENS, CACHE_TOKENS = 64, 16_384
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
    """The median seconds of a step, and the share of what is outside the engine."""

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
    return Ran(statistics.median(times), (sum(times) - engine_s) / engine_s)


def measure(engine: Engine, guidance: Guidance, batch: int, num_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each schema."""
    ways: Sequence[str] = (FREE, *SCHEMAS)
    found: dict[str, list[Ran]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way in ways if turn % 2 else reversed(ways):
            ran = run(engine, guidance, way, batch, num_tokens, turn)
            found[way] += [ran] if turn else []
    rows = []
    for schema in SCHEMAS:
        ratios = [guided.step_s / free.step_s for guided, free in zip(found[schema], found[FREE], strict=True)]
        rows.append(
            {
                "batch": batch,
                "schema": schema,
                "free_s": statistics.median(each.step_s for each in found[FREE]),
                "guided_s": statistics.median(each.step_s for each in found[schema]),
                "slower": statistics.median(ratios) - 1,
                "free_own": statistics.median(each.own for each in found[FREE]),
                "guided_own": statistics.median(each.own for each in found[schema]),
            }
        )
    return rows


def main() -> None:
    """Measure each batch, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    engine, _ = engine_and_decode(args)
    engine.reserve(CACHE_TOKENS)
    guidance = Guidance(Tokenizer.load(Path(args.model)), engine.config.vocab_size)
    try:
        rows = [row for batch in args.batches for row in measure(engine, guidance, batch, args.tokens, args.rounds)]
    finally:
        guidance.close()
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'batch':>5} {'schema':>8} {'free ms':>9} {'guided ms':>9} {'slower':>7} {'own':>7} {'guided':>7}")
    for row in rows:
        print(
            f"{row['batch']:5d} {row['schema']:>8} {row['free_s'] * 1e3:9.2f} {row['guided_s'] * 1e3:9.2f} "
            f"{row['slower']:+7.1%} {row['free_own']:7.1%} {row['guided_own']:7.1%}"
        )


if __name__ == "__main__":
    main()
