"""What the planner foretells of training on this machine beside what it then measures: step time and peak memory.

    python benchmarks/plan_training.py [--measure] [--steps 4]

What one of each counted thing takes is found on made-up models (`moesaic.bench.training_here`, kept for later runs;
--measure: anew). The cells below are others; each runs in a process of its own.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from typing import Any

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.plan.training_kernels import TrainingCell, measured_training
from moesaic.plan.verify import Prediction, store

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
    "dense, 8 x 256, fp32": (_DENSE, {"sequences": 8, "length": 256}),
    "16 experts, 2 x 4 x 256, fp32": (_QWEN, {"sequences": 4, "length": 256, "micro_batches": 2}),
}


def cell_of(name: str) -> TrainingCell:
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


def line(title: str, errors: list[float]) -> str:
    sizes = sorted(map(abs, errors))
    return f"{title}: {len(sizes)} cells, median error {statistics.median(sizes):.1%}, largest {sizes[-1]:.1%}"


def main() -> None:
    """Train every cell, print it beside its plan."""
    parser = argparse.ArgumentParser(description="Plans of training on this machine beside what it measures.")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options.steps)))
        return
    if options.measure or measured_training() is None:
        measure = "from moesaic.bench.training_here import measure_training; measure_training()"
        subprocess.run([sys.executable, "-c", measure], check=True)  # apart, so that its memory is its own
    rates = measured_training()
    assert rates is not None, "measured just now"
    times, peaks = [], []
    for name in CELLS:
        command = [sys.executable, __file__, "--worker", name, "--steps", str(options.steps)]
        done = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        cell = cell_of(name)
        seconds, peak = rates.step_seconds(cell), rates.peak_bytes(cell)
        found = Prediction(
            source="train", model=name, quantity="step_s", predicted=seconds, measured=done["seconds"], setting={}
        )
        memory = dataclasses.replace(found, quantity="peak_bytes", predicted=peak, measured=done["peak"])
        store([found, memory])
        times.append(found.error)
        peaks.append(memory.error)
        print(
            f"{name:<32} {seconds * 1e3:8.1f} {done['seconds'] * 1e3:8.1f} ms {found.error:+7.1%}   "
            f"{peak / 1e6:7.0f} {done['peak'] / 1e6:7.0f} MB {memory.error:+7.1%}",
            flush=True,
        )
    print(line("step time", times))
    print(line("peak memory", peaks))


if __name__ == "__main__":
    main()
