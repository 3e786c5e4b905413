"""What telemetry costs: the trainer's step with all it records by default, and without, interleaved.

Recorded: rows per expert, layer and domain, router entropy, and the line of metrics.jsonl. Two models: that of
benchmarks/train_step.py, and the demo's, whose short steps feel it most.

    python benchmarks/telemetry.py [--rounds 15] [--threads 2] [--json]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesaic.data.loader import Batch
from moesaic.families import family
from moesaic.models.decoder import Decoder
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.train.compare import DEMO_MODEL
from moesaic.train.recipe import TrainSettings
from moesaic.train.step import Stepper

NUM_DOMAINS = 6
TRAIN_STEP_MODEL: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "intermediate_size": 1024,
    "norm_topk_prob": True,
}
# name: model, vocabulary, sequences a step, steps a sample
CASES = {"train_step": (TRAIN_STEP_MODEL, 8192, 8, 1), "demo": (DEMO_MODEL, 4096, 4, 10)}


class Subject:
    """One model in training, with or without its recorder."""

    def __init__(self, model: dict[str, Any], vocab_size: int, batch_size: int, metrics: Path) -> None:
        hf = {"max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": None, **model}
        config = family("qwen3_moe").from_hf({"vocab_size": vocab_size, **hf})
        settings = TrainSettings(batch_size=batch_size, sequence_length=256)
        self.stepper = Stepper(Decoder(config).initialize(0), settings)
        self.recorder = LoadRecorder.for_model(config, num_domains=NUM_DOMAINS)
        self.metrics = metrics.open("a", buffering=1)
        self.batch_size, self.vocab_size, self.taken = batch_size, vocab_size, 0

    def step(self, recorded: bool) -> None:
        tokens = np.random.randint(0, self.vocab_size, (self.batch_size, 257))
        documents = np.zeros((self.batch_size, 256), dtype=np.int64)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], np.arange(self.batch_size) % NUM_DOMAINS, documents)
        result = self.stepper.run(self.taken, [batch], self.recorder if recorded else None)
        if result.load is not None:
            self.metrics.write(json.dumps({"loss": result.loss, "load": result.load.to_json()}) + "\n")
        self.taken += 1


def measure(subject: Subject, steps: int, rounds: int) -> dict[str, float]:
    """Seconds a step without and with telemetry, medians over rounds, and the median of the rounds' ratios."""
    spent: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for recorded in (False, True) if number % 2 else (True, False):  # neither always follows the other
            started = time.perf_counter()
            for _ in range(steps):
                subject.step(recorded)
            if number:
                spent[recorded].append((time.perf_counter() - started) / steps)
    ratios = [on / off for off, on in zip(spent[False], spent[True], strict=True)]
    return {
        "step_s": statistics.median(spent[False]),
        "recorded_step_s": statistics.median(spent[True]),
        "overhead": statistics.median(ratios) - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (model, vocab_size, batch_size, steps) in CASES.items():
            subject = Subject(model, vocab_size, batch_size, Path(folder) / f"{name}.jsonl")
            results[name] = measure(subject, steps, args.rounds)
    if args.json:
        print(json.dumps(results))
        return
    for name, result in results.items():
        plain, recorded = result["step_s"] * 1e3, result["recorded_step_s"] * 1e3
        print(f"{name:12s} {plain:8.1f} ms a step, {recorded:8.1f} ms recorded: {result['overhead']:+.1%}")


if __name__ == "__main__":
    main()
