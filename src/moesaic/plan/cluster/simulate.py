"""Simulates a model on a cluster: the usual settings, so that a model and a machine are enough."""

import math
from dataclasses import dataclass

from moesaic.checks import require
from moesaic.config import ModelConfig, MoeConfig
from moesaic.plan.cluster.loads import expert_loads
from moesaic.plan.cluster.outcome import ServingOutcome, outcome
from moesaic.plan.cluster.placed import place
from moesaic.plan.cluster.rates import observed
from moesaic.plan.cluster.requests import Workload
from moesaic.plan.cluster.serving import Pools, Serving
from moesaic.plan.cluster.training import Job, Training, TrainingOutcome
from moesaic.plan.cluster.troubles import Troubles
from moesaic.plan.cluster.unit import Unit
from moesaic.plan.formats import Formats
from moesaic.plan.hardware import Machine
from moesaic.plan.layout import Layout
from moesaic.plan.roofline import Speculation


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How experts are chosen and placed, and the seed of all that is drawn. routing: see loads.expert_loads; placement:
    a method of `moesaic.placement`; redundant: replicas of busy experts besides each one's own; None: the fewest with
    which experts divide over prefill and decode units alike (32 of DeepSeek-V3's 256 over 32 and 144 devices)."""

    routing: str = "recorded"
    placement: str = "refined"
    redundant: int | None = None
    overlap: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class PoolSizes:
    """Devices of a prefill and of a decode unit, and which share of all devices reads prompts. chunk: tokens that a
    device reads at a time."""

    prefill_ranks: int = 32
    decode_ranks: int = 144
    prefill_share: float = 0.42
    chunk: int = 16384

    def split(self, devices: int) -> tuple[int, int]:
        """Units of either pool. Raises ConfigError for fewer devices than one of each takes."""
        least = self.prefill_ranks + self.decode_ranks
        require(
            devices >= least,
            f"{devices} devices for units of {self.prefill_ranks} and {self.decode_ranks}; use {least} or more, or "
            "smaller units (prefill_ranks, decode_ranks)",
        )
        decodes = max(1, round(devices * (1 - self.prefill_share) / self.decode_ranks))
        while decodes > 1 and devices - decodes * self.decode_ranks < self.prefill_ranks:
            decodes -= 1
        return (devices - decodes * self.decode_ranks) // self.prefill_ranks, decodes


def simulate_serving(
    config: ModelConfig,
    formats: Formats,
    machine: Machine,
    workload: Workload,
    *,
    sizes: PoolSizes | None = None,
    setup: Setup | None = None,
    troubles: Troubles | None = None,
    speculation: Speculation | None = None,
    seconds: float = 60.0,
) -> tuple[Serving, ServingOutcome]:
    """`seconds` of serving, begun with as many texts under way as there would be. Raises ConfigError for what does not
    fit or divide."""
    sizes, setup, drafts = sizes or PoolSizes(), setup or Setup(), speculation or Speculation()
    prefills, decodes = sizes.split(machine.count)
    longest = int(workload.prompt + workload.output)
    require(
        longest <= config.context_length,
        f"prompts and outputs of {longest:,} tokens together; this model takes {config.context_length:,}, use fewer",
    )
    pools = Pools(
        prefill=_unit(config, formats, machine, sizes.prefill_ranks, sizes, setup, 1),
        decode=_unit(config, formats, machine, sizes.decode_ranks, sizes, setup, 1 + drafts.drafts),
        prefills=prefills,
        decodes=decodes,
        chunk=sizes.chunk,
        tokens_per_step=drafts.tokens_per_step,
    )
    run = Serving(pools, workload, troubles or Troubles(), seconds=seconds, seed=setup.seed).run()
    return run, outcome(run)


def _unit(
    config: ModelConfig, formats: Formats, machine: Machine, ranks: int, sizes: PoolSizes, setup: Setup, new: int
) -> Unit:
    per_node, loads = machine.device.per_node, expert_loads(config, setup.routing, seed=setup.seed)
    redundant = setup.redundant
    if redundant is None:
        redundant = usual_redundant(loads.shape[1], ranks, sizes)
    placed = place(config, loads, ranks=ranks, redundant=redundant, per_node=per_node, method=setup.placement)
    return Unit(
        config=config,
        formats=formats,
        device=observed(machine.device),
        ranks=ranks,
        placed=placed,
        redundant=redundant,
        new=new,
        overlap=setup.overlap,
    )


def usual_redundant(num_experts: int, ranks: int, sizes: PoolSizes) -> int:
    """Replicas with which experts divide over units of both kinds, or where these are many, over those of `ranks`."""
    both = math.lcm(sizes.prefill_ranks, sizes.decode_ranks)
    slots = -(-num_experts // both) * both
    if slots > 1.5 * num_experts:
        slots = -(-num_experts // ranks) * ranks
    return slots - num_experts


def simulate_training(
    config: ModelConfig,
    formats: Formats,
    machine: Machine,
    *,
    layout: Layout | None = None,
    micro_batches: int = 120,
    sequence: int = 4096,
    schedule: str | None = None,
    setup: Setup | None = None,
    troubles: Troubles | None = None,
) -> TrainingOutcome:
    """One step. Without a layout: 16 stages where there are 256 devices or more, experts over up to 64 devices."""
    setup = setup or Setup(routing="uniform", redundant=0)
    layout = layout or usual_layout(config, machine.count)
    require(
        layout.devices == machine.count and layout.tp == 1 and layout.etp == 1,
        f"a layout of {layout.devices} devices (tp={layout.tp}, etp={layout.etp}) for {machine.count}; give pp, dp "
        "and ep "
        "with pp x dp devices, tp and etp 1",
    )
    chances = expert_loads(config, setup.routing, seed=setup.seed)
    placed = place(config, chances, ranks=layout.ep, per_node=machine.device.per_node, method=setup.placement)
    job = Job(
        config=config,
        formats=formats,
        device=observed(machine.device, training=True),
        placed=placed,
        pp=layout.pp,
        dp=layout.dp,
        ep=layout.ep,
        micro_batches=micro_batches,
        sequence=sequence,
        schedule=schedule or _usual_schedule(layout.pp, micro_batches),
    )
    return Training(job, troubles, seed=setup.seed).run()


def _usual_schedule(stages: int, micro_batches: int) -> str:
    """DualPipe where it can be had."""
    fits = stages % 2 == 0 and micro_batches % 2 == 0 and micro_batches >= 2 * stages
    return "dualpipe" if fits else "1f1b"


def usual_layout(config: ModelConfig, devices: int) -> Layout:
    """DeepSeek-V3's proportions (arXiv:2412.19437, sec. 3.2): PP16 and EP64, as far as there are devices for them."""
    pp = 16 if devices % 16 == 0 and devices >= 256 and len(config.layers) >= 16 else 1
    moe = config.layers[config.moe_layers[0]].feed_forward if config.moe_layers else None
    experts = moe.num_experts if isinstance(moe, MoeConfig) else 1
    dp = devices // pp
    ep = max(size for size in range(1, min(64, dp) + 1) if dp % size == 0 and experts % size == 0)
    return Layout(pp=pp, dp=dp, ep=ep)
