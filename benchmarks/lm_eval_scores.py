"""lm-eval's scores of a served model beside those of transformers on the same weights.

    python benchmarks/lm_eval_scores.py MODEL --tasks FOLDER [--names a b c] [--limit 100] [--json]

MODEL is a folder that transformers reads, TASKS a folder of lm-eval's task files (where they say DATA_DIR, --data is
put in). Each task is run through `local-completions` against `moesaic serve`, in 32-bit arithmetic, and through
lm-eval's own backend of transformers. Printed: every metric of both, and of how many documents the answers are the same
(the likeliest choice, or the text that was written). Wanted: scores within 0.2 points. Needs the extra `eval`.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from servers import moesaic

from moesaic.cli import output

WANTED = 0.2
NAMES = ("moe_arc_easy", "moe_winogrande", "moe_boolq", "moe_gsm8k")


class Scored(NamedTuple):
    """metrics: in points, by task and name. answers: of each document, by task."""

    metrics: dict[tuple[str, str], float]
    answers: dict[str, list[Any]]


def main() -> None:
    """Score both ways, and print them side by side."""
    args = parser_of(__doc__).parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
        tasks = tasks_of(args, Path(folder))
        ours, theirs = served(args, tasks), in_transformers(args, tasks)
    rows = [
        {
            "task": task,
            "metric": metric,
            "served": round(ours.metrics[task, metric], 2),
            "transformers": round(theirs.metrics[task, metric], 2),
            "same answers": f"{same(ours.answers[task], theirs.answers[task]):.1%}",
            "documents": len(ours.answers[task]),
        }
        for task, metric in ours.metrics
    ]
    apart = max(abs(ours.metrics[key] - theirs.metrics[key]) for key in ours.metrics)
    if args.json:
        print(json.dumps({"rows": rows, "largest_difference": apart}))
    else:
        output.table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])
        print(f"largest difference: {apart:.2f} points (wanted: {WANTED} or less)")
    if apart > WANTED:
        sys.exit(1)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With the model, the tasks and how many of their documents."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="what DATA_DIR in the task files means (the folder above --tasks)")
    parser.add_argument("--names", nargs="+", default=NAMES)
    parser.add_argument("--limit", type=int, default=100, help="documents of each task (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of a written answer (%(default)s)")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--json", action="store_true")
    return parser


def tasks_of(args: argparse.Namespace, folder: Path) -> Path:
    """A folder of the named task files, with the place of their data in them."""
    data = args.data or args.tasks.resolve().parent
    for name in args.names:
        text = (args.tasks / f"{name}.yaml").read_text(encoding="utf-8")
        (folder / f"{name}.yaml").write_text(text.replace("DATA_DIR", str(data)), encoding="utf-8")
    return folder


def served(args: argparse.Namespace, tasks: Path) -> Scored:
    """Through the server. A batch there is a list of prompts, all of which run together."""
    server = moesaic("moesaic", str(args.model), "--set", "models.model.dtype=fp32")
    arguments = {
        "model": "model",
        "base_url": f"{server.url}/v1/completions",
        "num_concurrent": 4,
        "max_length": args.max_length,
    }
    try:
        return scored("local-completions", arguments, args, tasks)
    finally:
        server.stop()


def in_transformers(args: argparse.Namespace, tasks: Path) -> Scored:
    """Through lm-eval's own backend."""
    arguments = {"pretrained": str(args.model), "dtype": "float32", "device": "cpu", "max_length": args.max_length}
    return scored("hf", arguments, args, tasks)


def scored(backend: str, arguments: dict[str, Any], args: argparse.Namespace, tasks: Path) -> Scored:
    """All tasks through one of lm-eval's backends."""
    import lm_eval  # pyright: ignore[reportMissingImports]  an extra
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    found: Any = lm_eval.simple_evaluate(
        model=backend,
        model_args=arguments,
        tasks=list(args.names),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        limit=args.limit,
        log_samples=True,
        bootstrap_iters=0,
        batch_size=8,
        gen_kwargs={"max_gen_toks": args.new_tokens},
    )
    metrics = {
        (task, name.partition(",")[0]): 100 * value
        for task in args.names
        for name, value in found["results"][task].items()
        if isinstance(value, float) and "stderr" not in name
    }
    return Scored(metrics, {task: [answer(each) for each in found["samples"][task]] for task in args.names})


def answer(sample: dict[str, Any]) -> Any:
    """What the model answered to a document: the number of the likeliest choice, or a text."""
    found = sample["resps"]
    if isinstance(found[0][0], str):
        return found[0][0]
    likelihoods = [float(choice[0][0]) for choice in found]
    return likelihoods.index(max(likelihoods))


def same(ours: list[Any], theirs: list[Any]) -> float:
    """The share of documents that are answered alike."""
    return sum(mine == other for mine, other in zip(ours, theirs, strict=True)) / len(ours)


if __name__ == "__main__":
    main()
