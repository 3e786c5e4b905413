"""The same documents, laid out in different ways, through one training step in fp64; what came of it.

B batch, S sequence.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch

from moesaic.config import ModelConfig
from moesaic.data.loader import Batch
from moesaic.errors import ConfigError, NonFiniteError
from moesaic.layers.router import RouterLayer
from moesaic.parallel import ALONE, Ranks
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.train.micro_batches import IGNORED
from moesaic.train.recipe import TrainSettings
from moesaic.train.step import Stepper
from tests.tiny import lively, tiny_config

NUM_DOCUMENTS, LONGEST = 8, 12
CONFIG = tiny_config(windows=(None, 5, None), router="sigmoid_topk", selection_bias=True)
EXACT = ("global_exact", "sequence", "router_z")
SETTINGS = TrainSettings(steps=20, warmup_steps=2, selection_bias_rate=0.01)

Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, targets, document ids


def settings_of(*names: str, coefficient: float = 1.0, **fields: Any) -> TrainSettings:
    losses = tuple((name, coefficient) for name in names)
    return dataclasses.replace(SETTINGS, balance_losses=losses, **fields)


def documents(number: int = NUM_DOCUMENTS, seed: int = 0) -> list[np.ndarray]:
    """Of different lengths; each begins with its own few tokens, so that their loads differ."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, LONGEST + 1, number)
    return [rng.integers(5 * (i % 4), 5 * (i % 4) + 25, length) for i, length in enumerate(lengths)]


def row_of(parts: list[np.ndarray], length: int, left: bool = False) -> Row:
    """Documents one after the other, then (or before them) padding; the last token of each has no target."""
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    targets = [np.append(part[1:], IGNORED) for part in parts]
    ids = [np.full(len(part), number) for number, part in enumerate(parts)]
    width = length - len(tokens)
    pad = (width, 0) if left else (0, width)
    return (
        np.pad(tokens, pad, constant_values=7).astype(np.int64),
        np.pad(np.concatenate([*targets, []]), pad, constant_values=3).astype(np.int64),  # padding must not count
        np.pad(np.concatenate([*ids, []]), pad, constant_values=-1).astype(np.int64),
    )


def rows(layout: str) -> list[Row]:
    """right, left: a row a document. packed: two in a row. empty: rows of nothing between the others."""
    texts = documents()
    if layout == "packed":
        return [row_of(texts[i : i + 2], 2 * LONGEST + 1) for i in range(0, len(texts), 2)]
    found = [row_of([text], LONGEST + (3 if layout == "left" else 0), left=layout == "left") for text in texts]
    if layout == "empty":
        return [row for own in found for row in (own, row_of([], LONGEST))]
    return found


def cut(all_rows: list[Row], num_parts: int) -> list[Batch]:
    """Micro-batches of as many rows each."""
    size = len(all_rows) // num_parts
    return [batch_of(all_rows[i * size : (i + 1) * size]) for i in range(num_parts)]


def batch_of(some: list[Row]) -> Batch:
    tokens, targets, ids = (np.stack(part) for part in zip(*some, strict=True))
    return Batch(tokens, targets, np.zeros(len(some), dtype=np.int64), ids)


def one_step(
    settings: TrainSettings,
    micro_batches: list[Batch],
    ranks: Ranks = ALONE,
    config: ModelConfig = CONFIG,
    seed: int = 0,
) -> dict[str, Any]:
    """Loss, balance values, gradients, loads and biases of one step of a model in fp64."""
    model = lively(config).double()
    trained = Stepper(model, settings, ranks=ranks)
    gradients = {}

    def keep(step: int, learning_rate: float, norm: torch.Tensor) -> None:
        for weight in trained.optimizer.weights:
            gradient = trained.optimizer.gradients.of(weight)
            assert gradient is None or gradient.dtype == torch.float64
            gradients[weight.name] = torch.zeros_like(weight.parameter) if gradient is None else gradient.clone()

    trained.optimizer.step = keep
    torch.manual_seed(seed)
    result = trained.run(0, micro_batches, LoadRecorder.for_model(config))
    assert result.load is not None
    return {
        "loss": result.loss,
        "balance": result.balance,
        "gradients": {name: gradient.detach() for name, gradient in gradients.items()},
        "counts": [layer.counts_E.tolist() for layer in result.load.layers],
        "num_tokens": [layer.num_tokens for layer in result.load.layers],
        "biases": {name: buffer.clone() for name, buffer in model.named_buffers() if "bias" in name},
        "first_pass_s": result.first_pass_s,
    }


class Steps(NamedTuple):
    """Rows that ranks share in turn, and the steps that each makes with its own: settings and micro-batches."""

    rows: list[Row]
    runs: list[tuple[TrainSettings, int]]


def on_rank(ranks: Ranks, steps: Steps) -> list[dict[str, Any]]:
    """What came of each step on this rank."""
    mine = steps.rows[ranks.rank :: ranks.size]
    return [one_step(settings, cut(mine, num_parts), ranks) for settings, num_parts in steps.runs]


def without_targets(some: list[Row]) -> list[Row]:
    """The same tokens, for the balance losses' gradients alone."""
    return [(tokens, np.full_like(targets, IGNORED), ids) for tokens, targets, ids in some]


def three_steps(ranks: Ranks, some: list[Row]) -> dict[str, Any]:
    """Real steps on each rank's own rows; what each knows afterwards."""
    trained = Stepper(lively(CONFIG), settings_of("global_running"), ranks=ranks)
    recorder = LoadRecorder.for_model(CONFIG)
    results = [trained.run(step, cut(some[ranks.rank :: ranks.size], 2), recorder) for step in range(3)]
    load = results[-1].load
    assert load is not None
    return {
        "state": {name: tensor.clone() for name, tensor in trained.model.state_dict().items()},
        "losses": [result.loss for result in results],
        "norms": [result.gradient_norm for result in results],
        "tokens": load.layers[0].num_tokens,
    }


def broken_ranks(ranks: Ranks, some: list[Row]) -> dict[str, Any]:
    """The errors that a rank sees when one has another number of micro-batches, or a loss that is not a number."""
    errors = []
    trained = Stepper(lively(CONFIG), settings_of("global_exact"), ranks=ranks)
    try:
        trained.run(0, cut(some, 2 if ranks.rank == 1 else 4))
    except ConfigError as error:
        errors.append(str(error))
    if ranks.rank == 1:
        with torch.no_grad():
            trained.model.final_norm.weight[0] = float("nan")
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    try:
        trained.run(0, cut(some, 2))
    except NonFiniteError as error:
        errors.append(str(error))
    after = trained.model.state_dict()
    moved = [name for name in before if not torch.equal(after[name].nan_to_num(), before[name].nan_to_num())]
    return {"errors": errors, "moved": moved}


def router_of(model: torch.nn.Module, layer: int) -> RouterLayer:
    """The router of one layer."""
    router = model.get_submodule(f"layers.{layer}.feed_forward.router")
    assert isinstance(router, RouterLayer)
    return router


def ratio(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """How many times `wanted` is in `found`: the projection's length."""
    dot = sum(float((found[name] * wanted[name]).sum()) for name in wanted)
    return dot / sum(float(wanted[name].square().sum()) for name in wanted)


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference of two gradients, relative to the largest number in them."""
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted) / scale
