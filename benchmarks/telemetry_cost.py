"""What telemetry costs: a training step with all it records by default and without, and a token of decoding likewise.

Interleaved: both kinds take turns on the same model, in pairs of short blocks of steps in drawn order (see paired.py).
Once of the clock, and once of the processor time of all threads, which does not run while others have the processor
(but has what waiting threads spin in).

Recorded while training: rows per expert, layer and domain, mean scores, entropies, margins and flips of logits, the
line of metrics.jsonl, TensorBoard's scalars and Prometheus text. While decoding: every token's experts, from the
engine's own buffers. That code is also timed by itself (`direct`: the median times of hearing a step and of writing it
or adding it up, as a part of the median step): no noise of other code is in it, and nothing of what it may do to the
caches. Two models train: that of benchmarks/train_step.py, and the demo's, whose short steps feel it
most; one decodes, of 16 layers. Results with and without are compared bit by bit.

    python benchmarks/telemetry_cost.py [--rounds 60] [--cases decode] [--threads 2] [--json]
"""

import argparse
import hashlib
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from paired import cost, interval, verdict

from moesaic.data.loader import Batch
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.families import family
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingDecision
from moesaic.telemetry.engine import EngineRecorder
from moesaic.telemetry.load import StepLoad
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
DECODED = 4  # tokens a block
PAIRS_OF_DECODING = 16  # for each of training
TOKENS_ADDED_UP = 64  # between two sums of what was heard
# name: model, vocabulary, sequences a step, steps a block
CASES = {"train_step": (TRAIN_STEP_MODEL, 8192, 8, 1), "demo": (DEMO_MODEL, 4096, 4, 4)}
MOST_COST = {"train_step": 0.03, "demo": 0.03, "decode": 0.01}
"""What telemetry may cost."""


class TimedRecorder(LoadRecorder):
    """A recorder that notes how long it listens."""

    spent_s = 0.0

    def hear(self, layer: int, decision: RoutingDecision) -> None:
        started = time.perf_counter()
        super().hear(layer, decision)
        self.spent_s += time.perf_counter() - started

    def finish_step(self, step: int | None = None) -> StepLoad:
        started = time.perf_counter()
        load = super().finish_step(step)
        self.spent_s += time.perf_counter() - started
        return load


class Training:
    """One model in training, with or without its recorder."""

    def __init__(self, model: dict[str, Any], vocab_size: int, batch_size: int, folder: Path) -> None:
        config = config_of(model, vocab_size)
        settings = TrainSettings(batch_size=batch_size, sequence_length=256)
        self.stepper = Stepper(Decoder(config).initialize(0), settings)
        self.recorder = TimedRecorder.for_model(config, num_domains=NUM_DOMAINS)
        self.recorded_s: list[float] = []
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
            started = time.perf_counter()
            line = {"step": self.taken, "loss": result.loss, "load": result.load.to_json()}
            self.metrics.write(json.dumps(line) + "\n")
            self.events.add(self.taken, line_scalars(line))
            self.scraped.add(result.load)
            self.recorded_s.append(self.recorder.spent_s + time.perf_counter() - started)
            self.recorder.spent_s = 0.0

    def direct_s(self) -> float:
        """What telemetry takes a step, by the median."""
        return statistics.median(self.recorded_s)

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
        self.heard_s: list[float] = []
        self.unheard_s: list[float] = []
        self.added_up_s: list[float] = []

    def run(self, recorded: bool) -> None:
        """One token, after at most 512 others."""
        if self.text.length >= 512:
            self.engine.free(self.text)
            self.token = 1
        logits_NV = self.engine.step([Piece(self.text, [self.token])])
        started = time.perf_counter()  # either way: what the clocks take is not telemetry's
        if recorded:
            self.recorder.hear()
        (self.heard_s if recorded else self.unheard_s).append(time.perf_counter() - started)
        self.token = int(logits_NV[0].argmax())
        self.digest.update(logits_NV.numpy().tobytes())
        if recorded and len(self.heard_s) % TOKENS_ADDED_UP == 0:
            started = time.perf_counter()
            self.recorder.finish()
            self.added_up_s.append(time.perf_counter() - started)

    def direct_s(self) -> float:
        """What telemetry takes a token, by medians, without what the clocks take."""
        heard = statistics.median(self.heard_s) - statistics.median(self.unheard_s)
        return heard + statistics.median(self.added_up_s) / TOKENS_ADDED_UP

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


class Spent(NamedTuple):
    """Seconds of a block."""

    wall: float
    processor: float


def block(subject: Training | Decoding, steps: int, recorded: bool) -> Spent:
    """What so many steps take."""
    started = time.perf_counter(), time.process_time()
    for _ in range(steps):
        subject.run(recorded)
    return Spent(time.perf_counter() - started[0], time.process_time() - started[1])


def measure(subject: Training | Decoding, steps: int, pairs: int) -> dict[str, Any]:
    """Seconds a step without and with telemetry, and what it costs (`cost`) by both clocks."""
    chance = random.Random(0)
    spent: dict[bool, list[Spent]] = {False: [], True: []}
    for number in range(pairs + 1):
        for recorded in chance.sample((False, True), 2):
            found = block(subject, steps, recorded)
            if number:  # the first pair warms up
                spent[recorded].append(found)
    both = list(zip(spent[False], spent[True], strict=True))
    return {
        "step_s": statistics.median(each.wall for each in spent[False]) / steps,
        "recorded_step_s": statistics.median(each.wall for each in spent[True]) / steps,
        **cost([on.wall / off.wall for off, on in both]),
        "processor": cost([on.processor / off.processor for off, on in both]),
    }


def measured(name: str, rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    """One case: whether results are the same, and the cost."""
    if name == "decode":
        decoding = [Decoding(DECODING_MODEL, threads) for _ in range(2)]
        equal = same_bits(decoding[0], decoding[1], 32)
        found = measure(decoding[0], DECODED, PAIRS_OF_DECODING * rounds)
        return {**found, "direct": decoding[0].direct_s() / found["step_s"], "bits_are_equal": equal}
    model, vocab_size, batch_size, steps = CASES[name]
    folders = [folder / f"{name}{number}" for number in range(2)]
    for each in folders:
        each.mkdir()
    pair = [Training(model, vocab_size, batch_size, each) for each in folders]
    equal = same_bits(pair[0], pair[1], 3)
    found = measure(pair[0], steps, rounds)
    return {**found, "direct": pair[0].direct_s() / found["step_s"], "bits_are_equal": equal}


def line(name: str, result: dict[str, Any]) -> str:
    """A case in a line."""
    plain, recorded = result["step_s"] * 1e3, result["recorded_step_s"] * 1e3
    shown = verdict(result, MOST_COST[name])
    bits = "same bits" if result["bits_are_equal"] else "OTHER BITS"
    return (
        f"{name:12s} {plain:8.2f} ms, {recorded:8.2f} ms recorded: {interval(result)}, of processor time "
        f"{interval(result['processor'])}, timed by itself {result['direct']:.2%}; below {MOST_COST[name]:.0%}: "
        f"{shown}; {bits}"
    )


def main() -> None:
    """Time each kind with and without a recorder, print the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds",
        type=int,
        default=60,
        help="pairs of blocks (%(default)s; 16 times as many, and shorter, of decoding)",
    )
    parser.add_argument("--cases", nargs="+", choices=list(MOST_COST), default=list(MOST_COST))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.cases:
            results[name] = measured(name, args.rounds, args.threads, Path(folder))
            if not args.json:
                print(line(name, results[name]), flush=True)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
