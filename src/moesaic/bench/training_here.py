"""What training steps take on this machine: made-up models of many shapes, and the least squares of what is counted."""

import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from moesaic.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig, MoeConfig, RouterConfig, StackConfig
from moesaic.data.loader import Batch
from moesaic.models.decoder import Decoder
from moesaic.plan.hardware import here_file
from moesaic.plan.training_kernels import Precision, TrainingCell, TrainingRates, fitted, memory_counts, time_counts
from moesaic.train.memory import peak_memory_bytes, reset_peak_memory
from moesaic.train.recipe import TrainSettings
from moesaic.train.size import fast_bf16
from moesaic.train.step import Stepper

STEPS = 4
_CPU = torch.device("cpu")


class Shape(NamedTuple):
    """A made-up model and its batch: experts 0 is dense."""

    hidden: int
    inner: int
    experts: int
    top_k: int
    layers: int
    vocabulary: int
    sequences: int
    length: int
    heads: int


SHAPES = (
    Shape(224, 112, 12, 3, 4, 2048, 4, 96, 7),
    Shape(224, 112, 12, 3, 4, 2048, 16, 192, 7),
    Shape(320, 160, 24, 2, 3, 6144, 6, 160, 5),
    Shape(320, 160, 24, 6, 3, 6144, 6, 320, 5),
    Shape(448, 224, 8, 2, 5, 1024, 3, 448, 7),
    Shape(448, 1280, 0, 1, 5, 4096, 8, 128, 7),
    Shape(192, 96, 40, 4, 6, 3072, 24, 128, 3),
    Shape(576, 288, 20, 2, 2, 12288, 2, 256, 9),
    Shape(576, 288, 20, 4, 2, 12288, 12, 256, 9),
    Shape(160, 640, 0, 1, 8, 512, 8, 640, 5),
    Shape(640, 320, 6, 2, 4, 1024, 8, 256, 10),
    Shape(416, 352, 28, 2, 5, 1536, 1, 128, 13),
    Shape(288, 224, 36, 3, 4, 768, 2, 64, 9),
    Shape(512, 2304, 0, 1, 6, 2048, 1, 96, 8),
)
"""The last three have many weights and few tokens: without them what a step does once for each weight (gradients, the
optimizer) cannot be told from the head, and was fitted as nothing."""


class Taken(NamedTuple):
    """Seconds of a step, bytes beyond what the process held before."""

    seconds: float
    num_bytes: float


def made_up(shape: Shape) -> ModelConfig:
    """The model of a shape."""
    head = shape.hidden // shape.heads // 2 * 2
    block: MoeConfig | MlpConfig = MlpConfig(intermediate_size=shape.inner)
    if shape.experts:
        router = RouterConfig(name="softmax_topk", num_experts=shape.experts, top_k=shape.top_k)
        block = MoeConfig(router=router, intermediate_size=shape.inner)
    attention = AttentionConfig(num_heads=shape.heads, num_key_value_heads=shape.heads, head_dim=head)
    return ModelConfig(
        family="qwen3_moe" if shape.experts else "qwen3",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        context_length=1024,
        decoder=StackConfig(layers=(LayerConfig(attention=attention, feed_forward=block),) * shape.layers),
    )


def take(cell: TrainingCell, steps: int = STEPS) -> Taken:
    """A few steps of a cell on random tokens, after one that warms up: the median, and what memory they took."""
    gc.collect()
    reset_peak_memory(_CPU)
    before = peak_memory_bytes(_CPU)
    stepper = Stepper(Decoder(cell.config).initialize(0), _settings(cell))
    times = []
    for number, batches in enumerate(_batches(cell, steps + 1)):
        start = time.perf_counter()
        stepper.run(number, batches)
        times.append(time.perf_counter() - start)
    return Taken(statistics.median(times[1:]), peak_memory_bytes(_CPU) - before)


def measure_training(*, keep: bool = True) -> TrainingRates:
    """Steps of all shapes, in fp32 and where the machine multiplies bf16 faster in that, too; takes a few minutes.

    keep: for later plans, in the state folder. Other programs make it wrong: `busy` says so where there were any.
    """
    seconds: dict[str, list[float]] = {}
    num_bytes: dict[str, list[float]] = {}
    base = math.inf
    shares: list[float] = []
    for precision in precisions():
        cells = [_cell(shape, precision) for shape in SHAPES]
        taken: list[Taken] = []
        for number in range(len(cells)):
            start, found = _apart(number, precision)
            base = min(base, start)
            taken.append(found)
            shares.append(_processor_share())
        seconds[precision] = fitted(np.array([time_counts(cell) for cell in cells]), [each.seconds for each in taken])
        counts = np.array([memory_counts(cell) for cell in cells])
        num_bytes[precision] = fitted(counts, [max(1.0, each.num_bytes) for each in taken])
    share = statistics.median(shares)
    rates = TrainingRates(seconds=seconds, num_bytes=num_bytes, base_bytes=base, share=share)
    if keep:
        path = here_file().with_name("training.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rates.to_dict()), encoding="utf-8")
    return rates


def _apart(number: int, precision: Precision) -> tuple[float, Taken]:
    """A shape in a process of its own, as memory that one model has left behind would hide what the next one takes:
    bytes that the process begins with, and what was taken beyond them."""
    code = f"from moesaic.bench import training_here; training_here.report({number}, {precision!r})"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    start, *taken = json.loads(done.stdout)
    return start, Taken(*taken)


def report(number: int, precision: Precision) -> None:
    """Print what `_apart` reads."""
    start = peak_memory_bytes(_CPU)
    print(json.dumps([start, *take(_cell(SHAPES[number], precision))]))


def precisions() -> tuple[Precision, ...]:
    """Those that anyone would train in here: bf16 without instructions for it takes torch's plain loops."""
    return ("fp32", "bf16") if fast_bf16("cpu") else ("fp32",)


def _processor_share() -> float:
    """What of the processors' time products of this program get now, 0 to 1."""
    square = torch.ones(1024, 1024)
    torch.mm(square, square)
    wall, own = time.perf_counter(), time.process_time()
    for _ in range(10):
        torch.mm(square, square)
    return min(1.0, (time.process_time() - own) / ((time.perf_counter() - wall) * torch.get_num_threads()))


def _cell(shape: Shape, precision: Precision) -> TrainingCell:
    return TrainingCell(config=made_up(shape), sequences=shape.sequences, length=shape.length, precision=precision)


def _settings(cell: TrainingCell) -> TrainSettings:
    return TrainSettings(
        batch_size=cell.sequences,
        sequence_length=cell.length,
        micro_batches=cell.micro_batches,
        precision=cell.precision,
        recompute="layers" if cell.recompute else "none",
        balance_losses=(("switch", 0.01),) if cell.config.moe_layers else (),
    )


def _batches(cell: TrainingCell, count: int) -> Iterator[list[Batch]]:
    generator = np.random.default_rng(0)
    shape = (cell.sequences, cell.length + 1)
    for _ in range(count):
        drawn = [generator.integers(0, cell.config.vocab_size, shape) for _ in range(cell.micro_batches)]
        domains = np.zeros(cell.sequences, dtype=np.int64)
        documents = np.zeros((cell.sequences, cell.length), dtype=np.int64)
        yield [Batch(tokens[:, :-1], tokens[:, 1:], domains, documents) for tokens in drawn]
