"""How long moesaic's own training step takes on this machine, and what it holds, by what made-up models took. No torch.

A step is a sum of things that are counted (multiplications of dense blocks and of experts, rows, weights that are read
and moved), each times what one of them takes. These figures are found by least squares from steps of made-up models.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from moesaic.config import ModelConfig, MoeConfig
from moesaic.errors import ConfigError
from moesaic.plan.hardware import here_file
from moesaic.plan.kinds import layer_kinds, part_specs
from moesaic.plan.layout import Layout
from moesaic.plan.memory import Training, stage_activations
from moesaic.plan.rates import QUIET_SHARE

Precision = Literal["fp32", "bf16"]
LOGITS_AT_ONCE = 2**22
"""As train/loss.py has it."""


@dataclass(frozen=True, kw_only=True)
class TrainingCell:
    """A step: micro_batches of `sequences` sequences of `length` tokens."""

    config: ModelConfig
    sequences: int
    length: int
    precision: Precision = "fp32"
    micro_batches: int = 1
    recompute: bool = False

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.sequences * self.length


def time_counts(cell: TrainingCell) -> np.ndarray:
    """What is counted of a step's time: multiplications of dense blocks, of experts, of the head and of attention's
    scores; numbers of rows; weights of experts that each micro-batch reads; all weights; layers; the step itself."""
    config, tokens = cell.config, cell.tokens * cell.micro_batches
    size = config.hidden_size
    dense = experts = expert_weights = scores = rows = 0.0
    for layer, _, count in layer_kinds(config.layers):
        specs = part_specs(layer.attention, size) + part_specs(layer.feed_forward, size)
        dense += count * sum(spec.numel for spec in specs if len(spec.shape) == 2 and spec.role != "router")
        experts += count * sum(spec.active_numel for spec in specs if spec.role == "experts")
        expert_weights += count * sum(spec.numel for spec in specs if spec.role == "experts")
        scores += count * layer.attention.score_flops(cell.length // 2) / 4
        moe = layer.feed_forward
        rows += count * (
            8 * size + (moe.router.top_k * 2 * size + moe.num_experts if isinstance(moe, MoeConfig) else 0)
        )
    head = config.vocab_size * size
    passes = cell.micro_batches
    forward = 4 / 3 if cell.recompute else 1.0
    return np.array(
        [
            forward * tokens * dense, forward * tokens * experts, float(tokens * head), forward * tokens * scores,
            forward * tokens * rows, passes * expert_weights, float(config.total), passes * len(config.layers), 1.0,
        ]
    )  # fmt: skip


def memory_counts(cell: TrainingCell) -> np.ndarray:
    """What is counted of a step's memory, in bytes: what is kept of weights; of rows for the backward pass; of logits
    and the head's gradient; and 1 for the rest."""
    config = cell.config
    element = 4.0 if cell.precision == "fp32" else 2.0
    kept = Training(
        recompute="layers" if cell.recompute else "none", tokens=cell.tokens, in_flight=1, element_bytes=element
    )
    at_once = min(cell.tokens, max(config.hidden_size, LOGITS_AT_ONCE // config.vocab_size))
    head = element * at_once * config.vocab_size + 4.0 * config.vocab_size * config.hidden_size
    weights = 16.0 if cell.precision == "fp32" else 18.0
    return np.array([weights * config.total, stage_activations(config, kept, Layout())[0], head, 1.0])


@dataclass(frozen=True, kw_only=True)
class TrainingRates:
    """Seconds and bytes of one of each thing that is counted, by precision; base_bytes: of a process that starts;
    share: of the processors' time that was not other programs' meanwhile."""

    seconds: dict[str, list[float]]
    num_bytes: dict[str, list[float]]
    base_bytes: float
    share: float = 1.0

    @property
    def busy(self) -> str | None:
        """What other programs did meanwhile, in words; None: nothing that matters."""
        return None if self.share >= QUIET_SHARE else f"other programs had {1 - self.share:.0%} of the processors"

    def step_seconds(self, cell: TrainingCell) -> float:
        """Of one step."""
        return float(time_counts(cell) @ self._of(self.seconds, cell))

    def peak_bytes(self, cell: TrainingCell) -> float:
        """The most that a process takes which trains so."""
        return self.base_bytes + float(memory_counts(cell) @ self._of(self.num_bytes, cell))

    def _of(self, table: Mapping[str, list[float]], cell: TrainingCell) -> np.ndarray:
        if cell.precision not in table:
            raise ConfigError(f"training in {cell.precision} was not measured here; known: {', '.join(table)}")
        return np.array(table[cell.precision])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def fitted(counts_NC: np.ndarray, measured_N: Sequence[float]) -> list[float]:
    """What one of each thing takes, 0 or more, so that relative errors are small (non-negative least squares, Lawson
    and Hanson, by coordinate descent)."""
    measured = np.asarray(measured_N, dtype=float)
    scale = counts_NC.max(0)
    scale[scale == 0] = 1.0
    a = counts_NC / scale / measured[:, None]
    weights = np.zeros(a.shape[1])
    gram, target = a.T @ a, a.T @ np.ones(len(measured))
    for _ in range(20_000):
        before = weights.copy()
        for column in range(len(weights)):
            if gram[column, column] > 0:
                gradient = gram[column] @ weights - target[column]
                weights[column] = max(0.0, weights[column] - gradient / gram[column, column])
        if np.abs(weights - before).max() < 1e-9 * max(1e-12, weights.max()):
            break
    return (weights / scale).tolist()


def measured_training() -> TrainingRates | None:
    """What was measured of training on this machine before; None where nothing was."""
    path = here_file().with_name("training.json")
    if not path.is_file():
        return None
    try:
        return TrainingRates(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); take it away, and training is measured again") from error
