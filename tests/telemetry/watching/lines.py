"""A run's folder and the lines that training writes into it."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def line(step: int, *, counts: tuple[int, ...] = (10, 20, 30, 40), **more: Any) -> dict[str, Any]:
    layers = [
        {
            "layer": layer,
            "top_k": 2,
            "counts": list(np.roll(counts, layer)),
            "num_tokens": sum(counts) // 2,
            "router_entropy": 1.0,
            "domain_counts": [list(counts)],
        }
        for layer in (0, 1)
    ]
    for layer in layers:
        layer["counts"] = [int(count) for count in layer["counts"]]
    facts = {"step": step, "tokens": 32 * step, "seconds": 0.5 * step, "loss": 5.0 - 0.01 * step, "tokens_per_s": 64.0}
    return {**facts, "peak_memory_bytes": 1_000_000, "load": {"step": step, "layers": layers}, **more}


def run_folder(place: Path, *, steps: int = 100) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    recipe = {"model": {"model_type": "qwen3_moe"}, "train": {"steps": steps}}
    (place / "recipe.json").write_text(json.dumps({"recipe": recipe, "corpus_folder": None}))
    return place


def append(folder: Path, *lines: dict[str, Any], end: str = "\n") -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n".join(map(json.dumps, lines)) + end)
