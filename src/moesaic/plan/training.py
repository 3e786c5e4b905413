"""A model on a machine that learns: what it holds, how long a step takes, what a budget of tokens takes and costs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moesaic.checks import require
from moesaic.config import ModelConfig
from moesaic.errors import ConfigError
from moesaic.plan.cost import HOUR, TrainingCost, cost_of_hours
from moesaic.plan.flops import training_flops
from moesaic.plan.formats import Formats, named
from moesaic.plan.hardware import Machine
from moesaic.plan.layout import Layout, candidates
from moesaic.plan.memory import DeviceMemory, Training, training_memory, training_stages
from moesaic.plan.roofline import StepTime, prefill_step, step_time
from moesaic.plan.routing import Routing, Uniform

BACKWARD = 2.0
"""Forward passes that a backward pass costs."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What is trained, where, and how. batch_tokens: of a whole step, of all devices."""

    config: ModelConfig
    training: Training
    machine: Machine
    layout: Layout
    batch_tokens: float
    sequence_length: int
    formats: Formats
    routing: Routing
    overlap: float = 0.5

    @property
    def memory(self) -> DeviceMemory:
        """Of the fullest device."""
        return training_memory(self.config, self.training, self.machine.device, self.layout)

    @property
    def stages(self) -> list[DeviceMemory]:
        """Of a device of each pipeline stage."""
        return training_stages(self.config, self.training, self.machine.device, self.layout)

    @property
    def _heaviest(self) -> Mapping[str, float]:
        """Of the stage with the most weights, for which the others wait."""
        return max((stage.parts for stage in self.stages), key=lambda parts: parts["weights"])

    @property
    def micro_batches(self) -> float:
        """That one copy works through in a step."""
        return max(1.0, self.batch_tokens / (self.training.tokens * self.layout.dp))

    def forward(self) -> StepTime:
        """One micro-batch through all stages."""
        texts = max(1.0, self.training.tokens / self.sequence_length) * self.layout.dp
        length = min(self.training.tokens, self.sequence_length)
        step = prefill_step(texts, length)
        alone = replace(self.layout, pp=1)
        device = self.machine.device
        return step_time(self.config, self.formats, step, device, alone, self.routing, overlap=self.overlap)

    @property
    def seconds(self) -> float:
        """Of one step: micro-batches through a pipeline (1F1B: pp - 1 of them long it fills and drains), the sum of
        gradients over copies, and the optimizer's pass over all it keeps."""
        passes = 1 + BACKWARD + (self.training.recompute == "layers")
        one = self.forward().seconds * passes / self.layout.pp
        working = one * (self.micro_batches + self.layout.pp - 1)
        summing = self._gradient_seconds()
        return working + summing * (1 - self.overlap) + self._optimizer_seconds()

    def _gradient_seconds(self) -> float:
        """A ring's sum of the gradients that copies share."""
        if self.layout.dp == 1:
            return 0.0
        held = self._heaviest["weights"] / self.training.weights * self.training.gradient
        device = self.machine.device
        rate = device.link if self.machine.count <= device.per_node else device.network or device.link
        return 2 * held * (self.layout.dp - 1) / self.layout.dp / (rate * device.efficiency.network)

    def _optimizer_seconds(self) -> float:
        """It reads and writes moments and masters, reads gradients, writes weights."""
        parts, device = self._heaviest, self.machine.device
        moved = 2 * parts["optimizer"] + parts["gradients"] + parts["weights"]
        return moved / (device.bandwidth * device.efficiency.memory)

    @property
    def tokens_per_second(self) -> float:
        return self.micro_batches * self.training.tokens * self.layout.dp / self.seconds

    @property
    def flops_utilisation(self) -> float:
        """Of the stated bf16 rate of all devices (MFU)."""
        useful = training_flops(self.config, self.sequence_length) * self.tokens_per_second
        return useful / (self.machine.count * self.machine.device.rate("bf16"))

    def cost(self, tokens: float) -> TrainingCost:
        """Of a budget of tokens."""
        require(tokens > 0, f"{tokens} training tokens; use 1 or more")
        hours = tokens / self.tokens_per_second / HOUR * self.machine.count
        return cost_of_hours(
            hours, self.machine, tokens=tokens, flops=training_flops(self.config, self.sequence_length) * tokens
        )


def make_training(
    config: ModelConfig,
    machine: Machine,
    training: Training | None = None,
    *,
    sequence_length: int = 4096,
    batch_tokens: float | None = None,
    layout: Layout | None = None,
    routing: Routing | None = None,
    precision: str = "bf16",
) -> TrainingRun:
    """A training run with the best layout where none is given.

    batch_tokens: None: 4M, or one micro-batch on each device where that is more. Raises ConfigError for a sequence
    beyond the model's context, and a layout that does not divide it.
    """
    training = training or Training()
    if not 0 < sequence_length <= config.context_length:
        raise ConfigError(
            f"sequences of {sequence_length:,} tokens; this {config.family} model takes 1 to {config.context_length:,}"
        )
    run = TrainingRun(
        config=config,
        training=training,
        machine=machine,
        layout=layout or Layout(),
        batch_tokens=batch_tokens or max(4e6, float(training.tokens * machine.count)),
        sequence_length=sequence_length,
        formats=named(precision),
        routing=routing or Uniform(),
    )
    if layout is None:
        return replace(run, layout=_best(run))
    layout.check(config)
    return run


def _best(run: TrainingRun) -> Layout:
    """Of the usual layouts that fit the fastest; else that with the most room left."""
    found = candidates(run.config, run.machine)
    if not found:
        raise ConfigError(f"no layout of {run.machine.name} divides this {run.config.family} model; use another number")
    rooms = {layout: replace(run, layout=layout).memory for layout in found}
    fitting = [layout for layout in found if rooms[layout].fits]
    if not fitting:
        return max(found, key=lambda layout: rooms[layout].free)
    return min(fitting, key=lambda layout: replace(run, layout=layout).seconds)
