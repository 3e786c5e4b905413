"""A training step with pipeline and expert parallelism, event by event.

A lane is what does one stage's chunks one after another: the ranks of an expert-parallel group at one place of the
pipeline, which wait for one another at every exchange. Each rank brings a micro-batch of its own. E experts, G ranks.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from moesaic.checks import require
from moesaic.config import LayerConfig, ModelConfig, MoeConfig
from moesaic.plan.cluster.events import Clock
from moesaic.plan.cluster.placed import Placed
from moesaic.plan.cluster.rates import timed
from moesaic.plan.cluster.schedules import SCHEDULES, WEIGHTS, Work
from moesaic.plan.cluster.troubles import Troubles
from moesaic.plan.flops import Step, step_ops
from moesaic.plan.formats import Formats
from moesaic.plan.hardware import Device
from moesaic.plan.layout import Layout
from moesaic.plan.network import step_traffic


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model's training on pp * dp devices; experts are spread over `ep` of the dp devices of a stage.

    micro_batches: of each device and step, one text of `sequence` tokens each. grad_bytes: of a parameter's gradient as
    it is summed. optimizer_bytes: read and written for a parameter by its update.
    """

    config: ModelConfig
    formats: Formats
    device: Device
    placed: Placed
    pp: int = 1
    dp: int = 1
    ep: int = 1
    micro_batches: int = 8
    sequence: int = 4096
    schedule: str = "dualpipe"
    grad_bytes: float = 4.0
    optimizer_bytes: float = 26.0

    def __post_init__(self) -> None:
        require(self.dp % self.ep == 0, f"ep={self.ep} does not divide dp={self.dp}; change one of them")
        layers = len(self.config.layers)
        require(self.pp <= layers, f"pp={self.pp} is more than the model's {layers} layers; use 1 to {layers}")
        SCHEDULES[self.schedule].check(self.schedule, self.pp, self.micro_batches)

    @property
    def devices(self) -> int:
        return self.pp * self.dp

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.dp * self.micro_batches * self.sequence


class LayerCost(NamedTuple):
    """Seconds of one layer's forward pass for a micro-batch on each rank, were all alike: experts, the rest, sending.

    sent_bytes: by one rank. rows: by one rank, to experts; 0 where it has none.
    """

    rest: float
    experts: float
    sending: float
    sent_bytes: float
    rows: int


class Chunk(NamedTuple):
    """A micro-batch at one stage: seconds of computing and sending, forward. Backward computes twice as long."""

    computing: float
    sending: float


@dataclass
class Lane:
    """One place of the pipeline in one group: what it is to do, and what has come in for it of either way."""

    group: int
    place: int
    slow: float
    order: deque[Work]
    forward: tuple[deque[int], deque[int]] = field(default_factory=lambda: (deque(), deque()))
    backward: tuple[deque[int], deque[int]] = field(default_factory=lambda: (deque(), deque()))
    weights: deque[float] = field(default_factory=deque)
    is_busy: bool = False
    busy_s: float = 0.0
    exposed_s: float = 0.0
    chunks: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether the next thing to do has come in."""
        if self.is_busy or not self.order:
            return False
        work = self.order[0]
        forward = work.forward is None or self.forward[work.forward]
        return bool(forward and (work.backward is None or self.backward[work.backward]))


@dataclass(frozen=True, kw_only=True)
class TrainingOutcome:
    """One step. idle: the share of time that lanes wait for one another. exposed: of sending that nothing hides.

    sync_s: summing gradients and updating weights, after the last chunk. lost_s: to failures, the step done again.
    """

    step_s: float
    pipeline_s: float
    sync_s: float
    lost_s: float
    failures: int
    devices: int
    tokens: int
    events: int
    idle: float
    exposed: float
    chunks: int
    rows_sent: int
    rows_computed: int
    bytes_sent: float
    bytes_received: float
    busiest_over_mean: float

    @property
    def tokens_per_device_s(self) -> float:
        return self.tokens / self.step_s / self.devices

    @property
    def hours_per_trillion(self) -> float:
        """Device hours."""
        return 1e12 / self.tokens_per_device_s / 3600


class Training:
    """A simulation of one step. Run it once."""

    def __init__(self, job: Job, troubles: Troubles | None = None, *, seed: int = 0) -> None:
        self.job, self.troubles = job, troubles or Troubles()
        self.random: Generator = np.random.default_rng(seed)
        self.clock, self.schedule = Clock(), SCHEDULES[job.schedule]
        self.stages = _stage_costs(job)
        groups = job.dp // job.ep
        slow = [[self.troubles.slow(self.random, job.ep) for _ in range(job.pp)] for _ in range(groups)]
        order = SCHEDULES[job.schedule].order
        self.lanes = [
            [Lane(g, p, slow[g][p], deque(order(p, job.pp, job.micro_batches))) for p in range(job.pp)]
            for g in range(groups)
        ]
        self.rows_sent = self.rows_computed = 0
        self.bytes_sent = self.bytes_received = 0.0
        self.crowding: list[float] = []
        self._chunks: dict[tuple[int, int, int], Chunk] = {}

    def run(self) -> TrainingOutcome:
        """Simulate the step, and again what failures undo."""
        for lanes in self.lanes:
            for number in range(self.job.micro_batches):
                way = number % 2 if self.schedule.both_ways else 0
                lanes[self._place(0, way)].forward[way].append(number)
            for lane in lanes:
                self._start(lane)
        while event := self.clock.next():
            getattr(self, f"_on_{event.kind}")(*event.about)
        assert not any(lane.order for lanes in self.lanes for lane in lanes), "a schedule that waits for itself"
        return self._outcome()

    def _place(self, stage: int, way: int) -> int:
        """Where a stage stands for micro-batches of one way; also the stage that a place is for them."""
        return self.job.pp - 1 - stage if way else stage

    def _start(self, lane: Lane) -> None:
        """The next thing to do, once what it needs is there."""
        if not lane.is_ready:
            return
        work = lane.order.popleft()
        forward = None if work.forward is None else lane.forward[work.forward].popleft()
        backward = None if work.backward is None else lane.backward[work.backward].popleft()
        seconds, exposed = self._seconds(lane, work, forward, backward)
        lane.is_busy = True
        lane.busy_s += seconds
        lane.exposed_s += exposed
        lane.chunks += (forward is not None) + (backward is not None)
        self.clock.plan(seconds, "end", (lane, work, forward, backward))

    def _seconds(self, lane: Lane, work: Work, forward: int | None, backward: int | None) -> tuple[float, float]:
        """How long a thing takes, and how much of that is sending that nothing hides: forward and backward chunks that
        run together hide each other's."""
        if work == WEIGHTS:
            return lane.weights.popleft(), 0.0
        computing = sending = 0.0
        if work.forward is not None and forward is not None:
            chunk = self._chunk(lane, forward, work.forward)
            computing, sending = chunk.computing, chunk.sending
        if work.backward is not None and backward is not None:
            chunk = self._chunk(lane, backward, work.backward)
            computing += chunk.computing * (1 if work.splits else 2)
            sending += chunk.sending
            if work.splits:
                lane.weights.append(chunk.computing)
        together = forward is not None and backward is not None
        exposed = max(0.0, sending - computing) if together else sending
        return computing + exposed, exposed

    def _on_end(self, lane: Lane, work: Work, forward: int | None, backward: int | None) -> None:
        lane.is_busy = False
        if work.forward is not None and forward is not None:
            self._pass_on(lane, forward, work.forward, +1)
        if work.backward is not None and backward is not None:
            self._pass_on(lane, backward, work.backward, -1)
        self._start(lane)

    def _pass_on(self, lane: Lane, number: int, way: int, direction: int) -> None:
        """To the next stage of the micro-batch's way; from the last one back."""
        stage = self._place(lane.place, way) + direction
        if stage < 0:
            return
        if stage == self.job.pp:
            lane.backward[way].append(number)
            return
        size = self.job.sequence * self.job.config.hidden_size * 2.0
        to = self.lanes[lane.group][self._place(stage, way)]
        self.clock.plan(size / _between_stages(self.job), "arrive", (to, number, way, direction))

    def _on_arrive(self, lane: Lane, number: int, way: int, direction: int) -> None:
        (lane.forward if direction > 0 else lane.backward)[way].append(number)
        self._start(lane)

    def _chunk(self, lane: Lane, number: int, way: int) -> Chunk:
        """A micro-batch's routing is drawn once; its backward pass sends and computes the same rows."""
        stage = self._place(lane.place, way)
        key = (lane.group, stage, number)
        if key not in self._chunks:
            self._chunks[key] = self._draw(stage, lane.slow)
        return self._chunks[key]

    def _draw(self, stage: int, slow: float) -> Chunk:
        computing = sending = 0.0
        for index, cost in self.stages[stage]:
            uneven = self._crowded(index, cost) if cost.rows else 1.0
            computing += slow * (cost.rest + cost.experts * uneven)
            sending += cost.sending * uneven
        return Chunk(computing, sending)

    def _crowded(self, index: int, cost: LayerCost) -> float:
        """Rows of all ranks fall on experts by their chances; the busiest rank's over the mean."""
        placed, ranks = self.job.placed, self.job.ep
        at = placed.moe_layers.index(index)
        chances_E = placed.chances_LE[at]
        rows_E = self.random.multinomial(cost.rows * ranks, chances_E / chances_E.sum())
        rows_P = rows_E / placed.placement.num_replicas_LE[at]
        rows_G = rows_P[placed.placement.expert_of_slot_LP[at]].reshape(ranks, -1).sum(-1)
        self.rows_sent += cost.rows * ranks
        self.rows_computed += round(float(rows_G.sum()))
        self.bytes_sent += cost.sent_bytes * ranks
        self.bytes_received += float((cost.sent_bytes * rows_G / rows_G.mean()).sum())
        self.crowding.append(float(rows_G.max() / rows_G.mean()))
        return self.crowding[-1]

    def _outcome(self) -> TrainingOutcome:
        lanes = [lane for group in self.lanes for lane in group]
        pipeline = self.clock.now
        sync = _sync_seconds(self.job)
        failures, lost = self._failures(pipeline + sync)
        sending = sum(lane.exposed_s for lane in lanes)
        return TrainingOutcome(
            step_s=pipeline + sync + lost,
            pipeline_s=pipeline,
            sync_s=sync,
            lost_s=lost,
            failures=failures,
            devices=self.job.devices,
            tokens=self.job.tokens,
            events=self.clock.num_events,
            idle=1 - sum(lane.busy_s for lane in lanes) / (pipeline * len(lanes)),
            exposed=sending / (pipeline * len(lanes)),
            chunks=sum(lane.chunks for lane in lanes),
            rows_sent=self.rows_sent,
            rows_computed=self.rows_computed,
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            busiest_over_mean=float(np.mean(self.crowding)) if self.crowding else 1.0,
        )

    def _failures(self, seconds: float) -> tuple[int, float]:
        """How often a device fails before the step is whole, and the time until it is begun for the last time."""
        count, lost = 0, 0.0
        while (after := self.troubles.until_failure(self.random, self.job.devices)) < seconds:
            count, lost = count + 1, lost + after + self.troubles.repair_s
            require(count < 1000, "a device fails in every step; give more hours between failures")
        return count, lost


def _between_stages(job: Job) -> float:
    """Bytes a second between devices of different stages and copies: other nodes, where there is more than one."""
    crosses = job.devices > job.device.per_node
    rate = job.device.network if crosses and job.device.network else job.device.link
    require(rate > 0, f"{job.device.name} states no link to other devices; give the machine one, or use one device")
    return rate * job.device.efficiency.network


def _stage_costs(job: Job) -> list[list[tuple[int, LayerCost]]]:
    """Each stage's layers with their numbers, cut so that all compute about as long; the last one has the head."""
    layers: tuple[LayerConfig, ...] = job.config.layers
    known: dict[LayerConfig, LayerCost] = {}
    for layer in layers:
        if layer not in known:
            known[layer] = _layer_cost(job, layer)
    head = 2.0 * job.config.vocab_size * job.config.hidden_size * job.sequence
    head_s = head / (job.device.rate("bf16") * job.device.efficiency.compute)
    seconds = np.array([known[layer].rest + known[layer].experts for layer in layers])
    ends = np.cumsum(seconds)
    stage_of = ((ends - seconds / 2) / (ends[-1] + head_s) * job.pp).astype(int)
    stages: list[list[tuple[int, LayerCost]]] = [[] for _ in range(job.pp)]
    for index, stage in enumerate(stage_of.tolist()):
        stages[stage].append((index, known[layers[index]]))
    stages[-1].append((-1, LayerCost(head_s, 0.0, 0.0, 0.0, 0)))
    return stages


def _layer_cost(job: Job, layer: LayerConfig) -> LayerCost:
    config = replace(job.config, decoder=replace(job.config.decoder, layers=(layer,)), encoder=None, mtp=())
    step = Step(kind="prefill", texts=job.ep, new=job.sequence, context=job.sequence)
    layout = Layout(dp=job.ep, ep=job.ep if config.moe_layers else 1)
    seconds = {op.name: timed(op, job.device).seconds for op in step_ops(config, job.formats, step, layout)}
    rest = sum(each for name, each in seconds.items() if name not in ("embedding", "head", "experts"))
    traffic = step_traffic(config, job.formats, step, layout, job.device)
    moe = layer.feed_forward
    rows = job.sequence * moe.router.top_k if isinstance(moe, MoeConfig) else 0
    sent = traffic.link_bytes + traffic.network_bytes
    return LayerCost(rest, seconds.get("experts", 0.0), traffic.seconds(job.device), sent, rows)


def _sync_seconds(job: Job) -> float:
    """Gradients summed over copies (a ring's 2 (n - 1) / n of the bytes, dense over dp, experts over dp / ep) and the
    update, of a stage's part each; its optimizer is spread over the copies (ZeRO-1)."""
    by_role = job.config.roles
    experts = by_role["experts"] / job.pp / job.ep
    dense = (sum(by_role.values()) - by_role["experts"]) / job.pp
    copies = job.dp // job.ep
    sent = 2 * job.grad_bytes * (dense * (job.dp - 1) / job.dp + experts * (copies - 1) / copies)
    summing = sent / _between_stages(job) if sent else 0.0
    updated = dense / job.dp + experts / copies
    return summing + updated * job.optimizer_bytes / (job.device.bandwidth * job.device.efficiency.memory)
