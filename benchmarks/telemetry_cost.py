"""What telemetry costs: a training step with all it records by default and without, and a token of decoding likewise.

Interleaved: both kinds take turns on the same model, in blocks of few steps, which the machine's moods hit alike, once
the one and once the other first. Reported are the median of the ratios of neighbouring blocks and the interval that
holds the true median with 95% (order statistics: it assumes nothing of the noise). Recorded while training: rows per
expert, layer and domain, mean scores, entropies, margins and flips of logits, the line of metrics.jsonl, TensorBoard's
scalars and Prometheus text. While decoding: every token's experts, from the engine's own buffers, added up after every
block, which is more often than they need be. Two models train: that of benchmarks/train_step.py, and the demo's, whose
short steps feel it most; one decodes, of 16 layers. Results with and without are compared bit by bit.

    python benchmarks/telemetry_cost.py [--rounds 60] [--cases decode] [--threads 2] [--json]
"""

import argparse
import hashlib
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesaic.data.loader import Batch
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.families import family
from moesaic.models.decoder import Decoder
from moesaic.telemetry.engine import EngineRecorder
from moesaic.telemetry.prometheus import PrometheusFile
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.telemetry.tensorboard import EventFile, line_scalars
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
DECODING_MODEL: dict[str, Any] = {
    **TRAIN_STEP_MODEL,
    "hidden_size": 512,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
}
DECODED = 16  # tokens a block
# name: model, vocabulary, sequences a step, steps a block
CASES = {"train_step": (TRAIN_STEP_MODEL, 8192, 8, 1), "demo": (DEMO_MODEL, 4096, 4, 4)}
MOST_COST = {"train_step": 0.03, "demo": 0.03, "decode": 0.01}
"""What telemetry may cost."""


class Training:
    """One model in training, with or without its recorder."""

    def __init__(self, model: dict[str, Any], vocab_size: int, batch_size: int, folder: Path) -> None:
        config = config_of(model, vocab_size)
        settings = TrainSettings(batch_size=batch_size, sequence_length=256)
        self.stepper = Stepper(Decoder(config).initialize(0), settings)
        self.recorder = LoadRecorder.for_model(config, num_domains=NUM_DOMAINS)
        self.metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self.events, self.scraped = EventFile(folder, 1), PrometheusFile(folder / "metrics.prom")
        self.batch_size, self.vocab_size, self.taken = batch_size, vocab_size, 0

    def finish(self) -> None:
        """Every step is written down by itself."""

    def run(self, recorded: bool) -> None:
        """One step."""
        generator = np.random.default_rng(self.taken)
        tokens = generator.integers(0, self.vocab_size, (self.batch_size, 257))
        documents = np.zeros((self.batch_size, 256), dtype=np.int64)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], np.arange(self.batch_size) % NUM_DOMAINS, documents)
        result = self.stepper.run(self.taken, [batch], self.recorder if recorded else None)
        self.taken += 1
        if result.load is not None:
            line = {"step": self.taken, "loss": result.loss, "load": result.load.to_json()}
            self.metrics.write(json.dumps(line) + "\n")
            self.events.add(self.taken, line_scalars(line))
            self.scraped.add(result.load)

    def bits(self) -> list[bytes]:
        """Everything that the steps have made."""
        return [tensor.detach().numpy().tobytes() for tensor in self.stepper.model.state_dict().values()]


class Decoding:
    """One engine that writes, with or without its recorder."""

    def __init__(self, model: dict[str, Any], threads: int) -> None:
        torch.manual_seed(0)
        config = config_of(model, 8192)
        self.engine = Engine(Decoder(config).initialize(0), bits=8, threads=threads)
        self.recorder = EngineRecorder(self.engine)
        self.text, self.token, self.digest = Text(), 1, hashlib.sha256()

    def run(self, recorded: bool) -> None:
        """One token, after at most 512 others."""
        if self.text.length >= 512:
            self.engine.free(self.text)
            self.token = 1
        logits_NV = self.engine.step([Piece(self.text, [self.token])])
        if recorded:
            self.recorder.hear()
        self.token = int(logits_NV[0].argmax())
        self.digest.update(logits_NV.numpy().tobytes())

    def finish(self) -> None:
        """Add up what was heard."""
        self.recorder.finish()

    def bits(self) -> list[bytes]:
        """A digest of all logits so far."""
        return [self.digest.digest()]


def config_of(model: dict[str, Any], vocab_size: int):
    """The model's description."""
    hf = {"max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": None, **model}
    return family("qwen3_moe").from_hf({"vocab_size": vocab_size, **hf})


def same_bits(one: Training | Decoding, other: Training | Decoding, steps: int) -> bool:
    """Whether the same steps give the same bits, recorded and not."""
    for _ in range(steps):
        one.run(True)
        other.run(False)
    return one.bits() == other.bits()


def measure(subject: Training | Decoding, steps: int, rounds: int) -> dict[str, float]:
    """Seconds a step without and with telemetry, and what it costs (`cost`), of so many pairs of blocks."""
    spent: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for recorded in (False, True) if number % 2 else (True, False):  # neither always follows the other
            started = time.perf_counter()
            for _ in range(steps):
                subject.run(recorded)
            if recorded:
                subject.finish()
            if number:  # the first pair warms up
                spent[recorded].append((time.perf_counter() - started) / steps)
    ratios = [on / off for off, on in zip(spent[False], spent[True], strict=True)]
    return {
        "step_s": statistics.median(spent[False]),
        "recorded_step_s": statistics.median(spent[True]),
        **cost(ratios),
    }


def cost(ratios: list[float]) -> dict[str, float]:
    """The median of ratios less 1, and between what it lies with 95%: the ordered values 0.98 sqrt(n) to both sides."""
    ordered, n = sorted(ratios), len(ratios)
    reach = 0.98 * math.sqrt(n)
    low, high = math.floor((n - 1) / 2 - reach), math.ceil((n - 1) / 2 + reach)
    return {
        "overhead": statistics.median(ordered) - 1,
        "low": ordered[max(0, low)] - 1,
        "high": ordered[min(n - 1, high)] - 1,
    }


def measured(name: str, rounds: int, threads: int, folder: Path) -> dict[str, float]:
    """One case: whether results are the same, and the cost."""
    if name == "decode":
        decoding = [Decoding(DECODING_MODEL, threads) for _ in range(2)]
        equal = same_bits(decoding[0], decoding[1], 2 * DECODED)
        return {**measure(decoding[0], DECODED, rounds), "bits_are_equal": equal}
    model, vocab_size, batch_size, steps = CASES[name]
    folders = [folder / f"{name}{number}" for number in range(2)]
    for each in folders:
        each.mkdir()
    pair = [Training(model, vocab_size, batch_size, each) for each in folders]
    equal = same_bits(pair[0], pair[1], 3)
    return {**measure(pair[0], steps, rounds), "bits_are_equal": equal}


def line(name: str, result: dict[str, float]) -> str:
    """A case in a line."""
    plain, recorded = result["step_s"] * 1e3, result["recorded_step_s"] * 1e3
    shown = "shown" if result["high"] < MOST_COST[name] else "not shown" if result["low"] < MOST_COST[name] else "NO"
    bits = "same bits" if result["bits_are_equal"] else "OTHER BITS"
    return (
        f"{name:12s} {plain:8.2f} ms, {recorded:8.2f} ms recorded: {result['overhead']:+.2%} ({result['low']:+.2%} to "
        f"{result['high']:+.2%}), below {MOST_COST[name]:.0%}: {shown}; {bits}"
    )


def main() -> None:
    """Time each kind with and without a recorder, print the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="pairs of blocks (%(default)s)")
    parser.add_argument("--cases", nargs="+", choices=list(MOST_COST), default=list(MOST_COST))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.cases:
            results[name] = measured(name, args.rounds, args.threads, Path(folder))
            if not args.json:
                print(line(name, results[name]), flush=True)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
