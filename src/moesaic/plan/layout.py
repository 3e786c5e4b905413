"""How a model is spread over devices: tensor, expert, pipeline and data parallelism.

Attention and dense blocks are split over `tp` devices and copied `dp` times; the experts of a stage are spread over the
same tp * dp devices, `ep` ways by expert and `etp` ways inside each (Megatron's parallel folding).
"""

import math
from dataclasses import dataclass

from moesaic.checks import require, require_positive
from moesaic.config import ModelConfig, MoeConfig
from moesaic.plan.hardware import Machine
from moesaic.plan.kinds import layer_kinds


@dataclass(frozen=True, kw_only=True)
class Layout:
    """tp * dp * pp devices. redundant: copies of busy experts besides each one's own (EPLB).

    Raises ConfigError for degrees that do not divide one another.
    """

    tp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    redundant: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "tp", "dp", "pp", "ep", "etp")
        require(self.redundant >= 0, f"redundant={self.redundant} experts; use 0 or more")
        stage = self.tp * self.dp
        require(
            stage % (self.ep * self.etp) == 0,
            f"ep={self.ep} times etp={self.etp} does not divide the {stage} devices of a stage (tp={self.tp} times "
            f"dp={self.dp}); use an ep of {_listed(stage // self.etp if stage % self.etp == 0 else stage)}",
        )

    @property
    def devices(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def stage_devices(self) -> int:
        """Devices that hold the same layers between them."""
        return self.tp * self.dp

    @property
    def expert_copies(self) -> int:
        """How often all experts are held by the devices of a stage."""
        return self.stage_devices // (self.ep * self.etp)

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where a model cannot be spread so: experts, heads and layers must divide."""
        layers = len(config.layers)
        require(self.pp <= layers, f"pp={self.pp} is more than the model's {layers} layers; use 1 to {layers}")
        for layer in config.layers:
            heads = layer.attention.num_heads
            require(heads % self.tp == 0, f"tp={self.tp} does not divide {heads} heads; use {_listed(heads)}")
            if isinstance(layer.feed_forward, MoeConfig):
                self._check_experts(layer.feed_forward)

    def _check_experts(self, moe: MoeConfig) -> None:
        slots = moe.num_experts + self.redundant
        extra = f" and {self.redundant} copies" if self.redundant else ""
        require(
            slots % self.ep == 0,
            f"num_experts={moe.num_experts}{extra} does not divide over ep={self.ep} devices; use {_listed(slots)}",
        )
        inner = moe.intermediate_size
        require(inner % self.etp == 0, f"etp={self.etp} does not divide experts of {inner}; use {_listed(inner)}")

    def __str__(self) -> str:
        named = {"tp": self.tp, "ep": self.ep, "etp": self.etp, "pp": self.pp, "dp": self.dp}
        parts = [f"{name.upper()}{value}" for name, value in named.items() if value > 1]
        return " ".join(parts) or "one device"


def candidates(config: ModelConfig, machine: Machine) -> list[Layout]:
    """The usual ways to serve a model on a machine: TP inside a node, experts over all, pipelines between nodes."""
    found = []
    for tp in _divisors(machine.count):
        for pp in _divisors(machine.count // tp):
            dp = machine.count // (tp * pp)
            if tp > machine.device.per_node:
                continue
            for ep, etp in {(tp * dp, 1), (1, tp)} if config.moe_layers else {(1, 1)}:
                layout = Layout(tp=tp, dp=dp, pp=pp, ep=ep, etp=etp)
                if _fits(layout, config):
                    found.append(layout)
    return found


def _fits(layout: Layout, config: ModelConfig) -> bool:
    if layout.pp > len(config.layers):
        return False
    for layer, _, _ in layer_kinds(config.layers):
        if layer.attention.num_heads % layout.tp:
            return False
        moe = layer.feed_forward
        if isinstance(moe, MoeConfig) and (moe.num_experts % layout.ep or moe.intermediate_size % layout.etp):
            return False
    return True


def _divisors(number: int) -> list[int]:
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def _listed(number: int) -> str:
    """The divisors, in words: all of a few, the first ones of many."""
    all_of = _divisors(number)
    shown = ", ".join(map(str, all_of[:-1][:9]))
    return f"{shown}{', ...' * (len(all_of) > 10)} or {all_of[-1]}" if len(all_of) > 1 else str(number)
