"""An MoE against its dense twins on the same batches, several seeds: held-out bits per byte at equal tokens.

All three models of each seed are trained for the same number of steps, the twin of equal total parameters too, so that
"where the MoE stands between its twins" is measured at the end of the schedule. Writes one JSON line a model to --out
as it goes; run it again with the same --out to go on where it stopped.

    python benchmarks/moe_against_twins.py [--seeds 0 1 2] [--steps 400] [--corpus FOLDER] [--out twins.jsonl]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from moesaic.cli.text_source import gather_text
from moesaic.train.compare import DEMO_MODEL, contenders, demo_settings, train_contender, with_steps
from moesaic.train.recipe import Recipe
from moesaic.train.verdicts import where_it_stands

NAMES = ("MoE", "dense, equal active", "dense, equal total")


def run_missing(seeds: list[int], steps: int, corpus: Path | None, out: Path) -> list[dict[str, Any]]:
    """Train what `out` does not hold yet; returns all of its results."""
    results = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(result["seed"], result["steps"], result["name"]) for result in results}
    text = gather_text(corpus, 4096)
    config = Recipe(model=DEMO_MODEL).model_config(text.tokenizer.vocab_size, text.packed.eos_id)
    for seed in seeds:
        settings = with_steps(demo_settings(seed), steps, evaluations=4)
        for contender in contenders(config, steps, steps):
            if (seed, steps, contender.name) in done:
                continue
            result = train_contender(contender, settings, text.packed, final_tokens=32_768).result
            line = {
                "seed": seed,
                "steps": steps,
                "name": contender.name,
                "total": result.total_parameters,
                "active": result.active_parameters,
                "tokens": result.training_tokens,
                "bits_per_byte": result.bits_per_byte,
                "by_domain": dict(result.domain_bits_per_byte),
                "seconds": round(result.training_time_s, 1),
            }
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            results.append(line)
            print(f"seed {seed}  {contender.name:20s} {result.bits_per_byte:.4f} bits per byte", flush=True)
    return [result for result in results if result["seed"] in seeds and result["steps"] == steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--out", type=Path, default=Path("twins.jsonl"))
    args = parser.parse_args()
    results = run_missing(args.seeds, args.steps, args.corpus, args.out)
    print(f"\n{'seed':>4s} {'MoE':>8s} {'active':>8s} {'total':>8s} {'below active':>13s}  where it stands")
    wins = 0
    for seed in args.seeds:
        moe, active, total = (
            next(r["bits_per_byte"] for r in results if r["seed"] == seed and r["name"] == name) for name in NAMES
        )
        wins += moe < active
        print(f"{seed:4d} {moe:8.4f} {active:8.4f} {total:8.4f} {1 - moe / active:13.2%}", end="  ")
        print(where_it_stands(moe, active, total))
    print(f"the MoE is below its equal-active twin in {wins} of {len(args.seeds)} seeds")


if __name__ == "__main__":
    main()
