"""What the planner foretells of training on this machine beside what it then measures: step time and peak memory.

    python benchmarks/plan_training.py [--measure] [--steps 4] [--json FILE]

What one of each counted thing takes is found on made-up models (`moesaic.bench.training_here`, kept for later runs;
--measure: anew). The cells below are others; each runs in a process of its own. Those in bf16 are left out where the
machine has no instructions for it. What is measured is kept for `moesaic plan verify`, and in FILE, cell by cell: a run
that was stopped goes on from there.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesaic import families
from moesaic.cli.main import main as moesaic
from moesaic.config import ModelConfig
from moesaic.plan.rates import measured_rates
from moesaic.plan.training_kernels import TrainingCell, TrainingRates, measured_training
from moesaic.plan.verify import Prediction, load, store

_QWEN: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 6, "head_dim": 64, "max_position_embeddings": 1024, "num_experts": 16,
    "num_experts_per_tok": 2, "moe_intermediate_size": 512, "intermediate_size": 1024, "norm_topk_prob": True,
    "tie_word_embeddings": False,
}  # fmt: skip
_SMALL = _QWEN | {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32,
    "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "vocab_size": 4096,
}  # fmt: skip
_GROUPED = _QWEN | {"num_key_value_heads": 2, "num_experts": 8, "moe_intermediate_size": 768, "num_hidden_layers": 4}
_DENSE = {key: value for key, value in _QWEN.items() if "expert" not in key} | {"model_type": "qwen3"}

CELLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "16 experts, 8 x 256, fp32": (_QWEN, {"sequences": 8, "length": 256}),
    "16 experts, 8 x 256, bf16": (_QWEN, {"sequences": 8, "length": 256, "precision": "bf16"}),
    "16 experts, 2 x 512, fp32": (_QWEN, {"sequences": 2, "length": 512}),
    "16 experts, 4 x 128, bf16": (_QWEN, {"sequences": 4, "length": 128, "precision": "bf16"}),
    "32 experts, 16 x 256, fp32": (_SMALL, {"sequences": 16, "length": 256}),
    "32 experts, 16 x 256, bf16": (_SMALL, {"sequences": 16, "length": 256, "precision": "bf16"}),
    "32 experts, 4 x 128, fp32": (_SMALL, {"sequences": 4, "length": 128}),
    "8 wide experts, 4 x 256, fp32": (_GROUPED, {"sequences": 4, "length": 256}),
    "8 wide experts, 8 x 512, bf16": (_GROUPED, {"sequences": 8, "length": 512, "precision": "bf16"}),
    "8 wide experts, 2 x 512, fp32": (_GROUPED, {"sequences": 2, "length": 512}),
    "32 experts, 4 x 512, fp32": (_SMALL, {"sequences": 4, "length": 512}),
    "dense, 4 x 128, fp32": (_DENSE, {"sequences": 4, "length": 128}),
    "dense, 8 x 256, fp32": (_DENSE, {"sequences": 8, "length": 256}),
    "16 experts, 2 x 4 x 256, fp32": (_QWEN, {"sequences": 4, "length": 256, "micro_batches": 2}),
}


def cell_of(name: str) -> TrainingCell:
    """The cell of this name."""
    raw, settings = CELLS[name]
    config: ModelConfig = families.from_hf(raw)
    return TrainingCell(config=config, **settings)


def work(name: str, steps: int) -> dict[str, float]:
    """One cell, in a process of its own: seconds of a step and the process's peak."""
    import torch

    from moesaic.bench.training_here import take
    from moesaic.train.memory import peak_memory_bytes

    taken = take(cell_of(name), steps)
    return {"seconds": taken.seconds, "peak": float(peak_memory_bytes(torch.device("cpu")))}


def run_apart(name: str, steps: int) -> dict[str, float]:
    """The same in another process."""
    command = [sys.executable, __file__, "--worker", name, "--steps", str(steps)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def predictions(rates: TrainingRates, name: str, done: dict[str, float]) -> list[Prediction]:
    """A cell's step and its peak."""
    cell, here = cell_of(name), measured_rates()
    step = Prediction(
        source="train",
        model=name,
        quantity="step_s",
        predicted=rates.step_seconds(cell),
        measured=done["seconds"],
        setting={"sequences": cell.sequences, "length": cell.length, "precision": cell.precision},
        machine=here.machine if here else "",
    )
    return [step, replace(step, quantity="peak_bytes", predicted=rates.peak_bytes(cell), measured=done["peak"])]


def show(step: Prediction, peak: Prediction) -> None:
    """One line of a table."""
    print(
        f"{step.model:<32} {step.predicted * 1e3:8.1f} {step.measured * 1e3:8.1f} ms {step.error:+7.1%}   "
        f"{peak.predicted / 1e6:7.0f} {peak.measured / 1e6:7.0f} MB {peak.error:+7.1%}",
        flush=True,
    )


def known_rates(options: argparse.Namespace) -> TrainingRates:
    """As they were measured before, or measured now."""
    if options.measure or measured_training() is None:
        measure = "from moesaic.bench.training_here import measure_training; measure_training()"
        subprocess.run([sys.executable, "-c", measure], check=True)  # apart, so that its memory is its own
    rates = measured_training()
    assert rates is not None, "measured just now"
    if rates.busy and not options.busy:
        raise SystemExit(f"steps were timed while {rates.busy}; --measure when it is quiet, or go on with --busy")
    return rates


def main() -> None:
    """Train every cell that is not kept yet, and print all beside their plans."""
    parser = argparse.ArgumentParser(description="Plans of training on this machine beside what it measures.")
    parser.add_argument("--measure", action="store_true", help="time the made-up models' steps anew")
    parser.add_argument("--busy", action="store_true", help="go on although other programs ran when they were timed")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cells", help="only those whose name has this in it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every cell there, a line each, and go on")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options.steps)))
        return
    rates = known_rates(options)
    done = {each.model for each in load(options.json)} if options.json else set()
    for name in CELLS:
        if name in done or cell_of(name).precision not in rates.seconds or (options.cells or "") not in name:
            continue
        found = predictions(rates, name, run_apart(name, options.steps))
        store(found, *([options.json] if options.json else []))
        show(*found)
    if options.json:
        moesaic(["plan", "verify", str(options.json)])


if __name__ == "__main__":
    main()
