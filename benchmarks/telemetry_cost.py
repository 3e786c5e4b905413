"""What telemetry costs: a training step with all it records by default and without, and a token of decoding likewise.

Interleaved: both kinds take turns on the same model, in blocks short enough for the machine's moods to hit both alike;
reported are medians over rounds, and the median of the rounds' ratios. Recorded while training: rows per expert, layer
and domain, mean scores, entropies, margins and flips of logits, the line of metrics.jsonl, TensorBoard's scalars and
Prometheus text. While decoding: every token's experts, from the engine's own buffers. Two models train: that of
benchmarks/train_step.py, and the demo's, whose short steps feel it most; one decodes, of 16 layers. Results with and
without are compared bit by bit.

    python benchmarks/telemetry_cost.py [--rounds 15] [--threads 2] [--json]
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
DECODED = 32  # tokens a sample
# name: model, vocabulary, sequences a step, steps a sample
CASES = {"train_step": (TRAIN_STEP_MODEL, 8192, 8, 1), "demo": (DEMO_MODEL, 4096, 4, 10)}


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
        self.recorder, self.written = EngineRecorder(self.engine), []
        self.text, self.token = Text(), 1

    def run(self, recorded: bool) -> None:
        """One token, after at most 512 others."""
        if self.text.length >= 512:
            self.engine.free(self.text)
            self.token = 1
        logits_NV = self.engine.step([Piece(self.text, [self.token])])
        if recorded:
            self.recorder.hear()
        self.token = int(logits_NV[0].argmax())
        self.written.append(logits_NV.numpy().tobytes())

    def bits(self) -> list[bytes]:
        """All logits so far."""
        return self.written


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
    """Seconds a step without and with telemetry, medians over rounds, and the median of the rounds' ratios."""
    spent: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for recorded in (False, True) if number % 2 else (True, False):  # neither always follows the other
            started = time.perf_counter()
            for _ in range(steps):
                subject.run(recorded)
            if number:
                spent[recorded].append((time.perf_counter() - started) / steps)
    ratios = [on / off for off, on in zip(spent[False], spent[True], strict=True)]
    return {
        "step_s": statistics.median(spent[False]),
        "recorded_step_s": statistics.median(spent[True]),
        "overhead": statistics.median(ratios) - 1,
    }


def main() -> None:
    """Time each kind with and without a recorder, print the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name_of_folder:
        for name, (model, vocab_size, batch_size, steps) in CASES.items():
            folders = [Path(name_of_folder) / f"{name}{number}" for number in range(2)]
            for folder in folders:
                folder.mkdir()
            pair = [Training(model, vocab_size, batch_size, folder) for folder in folders]
            equal = same_bits(pair[0], pair[1], 3)
            results[name] = {**measure(pair[0], steps, args.rounds), "bits_are_equal": equal}
        decoding = [Decoding(DECODING_MODEL, args.threads) for _ in range(2)]
        equal = same_bits(decoding[0], decoding[1], DECODED)
        results["decode"] = {**measure(decoding[0], DECODED, args.rounds), "bits_are_equal": equal}
    if args.json:
        print(json.dumps(results))
        return
    for name, result in results.items():
        plain, recorded = result["step_s"] * 1e3, result["recorded_step_s"] * 1e3
        bits = "same bits" if result["bits_are_equal"] else "OTHER BITS"
        print(f"{name:12s} {plain:8.2f} ms, {recorded:8.2f} ms recorded: {result['overhead']:+.2%}, {bits}")


if __name__ == "__main__":
    main()
