"""Disclosed speeds, and what the roofline says of them for given efficiencies.

A case knows what is computed, read and sent, once for all; `predict` then takes microseconds, so that efficiencies can
be fitted.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.plan.cluster.exchange import direct
from moesaic.plan.cluster.loads import expert_loads
from moesaic.plan.cluster.placed import Placed, place
from moesaic.plan.cluster.rates import ATTENTION, KERNELS
from moesaic.plan.disclosed.accounting import DAY_6, GSHARD, LMSYS, V3_REPORT
from moesaic.plan.flops import Op, Step, step_ops
from moesaic.plan.formats import named
from moesaic.plan.hardware import Device, find_device
from moesaic.plan.layout import Layout
from moesaic.plan.network import Traffic, step_traffic
from moesaic.plan.roofline import op_time
from moesaic.plan.routing import Uniform

PROFILE = "deepseek-ai/profile-data"
FP4 = "fp8,experts=mxfp4"
LLAMA_4 = "Llama 4 model card; tokens [M]"


class Constants(NamedTuple):
    """What is fitted. compute: the share of stated operations a second that matrix products get in serving. network:
    the share that messages get of what DeepEP's kernels reach. training: the share of `compute` that training gets,
    where backward kernels, recomputation and restarts count in. Sending hides behind computing wherever its source says
    that something is done to that end, and only there.
    """

    compute: float
    network: float
    training: float


class Case(NamedTuple):
    """A disclosed speed. group: rows of one source, which fit one another too well to be called strangers."""

    what: str
    unit: str
    disclosed: float
    predict: Callable[[Constants], float]
    assumed: str
    source: str
    group: str


class Timed:
    """A step's operations and messages, ready to be timed with any constants.

    hides: whether sending is meant to hide behind computing. uneven: of the busiest rank's rows over the mean, which
    stretches what it receives.
    """

    def __init__(
        self, ops: Sequence[Op], traffic: Traffic, device: Device, *, hides: bool = True, uneven: float = 1.0
    ) -> None:
        device = replace(device, efficiency=replace(KERNELS, compute=1.0))
        times = [op_time(op, device) for op in ops]
        attends = np.array([op.name == "attention" for op in ops])
        computing = np.array([each.computing for each in times])
        self.reading = np.maximum([each.reading for each in times], computing * attends / ATTENTION)
        self.computing = computing * ~attends
        self.launching = sum(each.launching for each in times)
        self.sending = traffic.seconds(device) * uneven
        self.hides = hides

    def working(self, compute: float) -> float:
        """Seconds of computing."""
        return float(np.maximum(self.computing / compute, self.reading).sum()) + self.launching

    def seconds(self, constants: Constants) -> float:
        working, sending = self.working(constants.compute), self.sending / constants.network
        return max(working, sending) if self.hides else working + sending


def cases() -> list[Case]:
    """Every one, in the order of the table."""
    return [*_training(), *_prefill(), *_decode(), *_gains()]


@cache
def _model(name: str) -> ModelConfig:
    return families.find_preset(name)


@cache
def _placed(ranks: int, routing: str, method: str) -> Placed:
    v3 = _model("deepseek-v3")
    return place(v3, expert_loads(v3, routing), ranks=ranks, redundant=_redundant(ranks), method=method)


def _redundant(ranks: int) -> int:
    """32 replicas, as DeepSeek and SGLang have, where they divide."""
    return 0 if (256 + 32) % ranks else 32


def _timed(step: Step, ranks: int, device: str, placing: str, hides: bool, formats: str) -> Timed:
    """DeepSeek-V3 with 32 redundant experts. placing: a method; "even" where tokens choose evenly."""
    v3, packed, found = (
        _model("deepseek-v3"),
        named(formats, "fp8" if "mxfp4" in formats else "bf16"),
        find_device(device),
    )
    layout = Layout(dp=ranks, ep=ranks, redundant=_redundant(ranks))
    placed = None if placing == "even" else _placed(ranks, "recorded", placing)
    ops = step_ops(v3, packed, step, layout, placed or Uniform())
    if step.kind == "decode":
        traffic = direct(v3, packed, step.tokens / ranks, ranks, found.per_node)
    else:
        traffic = step_traffic(v3, packed, step, layout, found)
    return Timed(ops, traffic, found, hides=hides, uneven=placed.mean_uneven if placed else 1.0)


def _read(
    tokens: float, context: float, device: str, placing: str = "refined", *, hides: bool = True, formats: str = "fp8"
) -> Timed:
    """A pass over prompts on 32 devices, `tokens` on each."""
    step = Step(kind="prefill", texts=32 * tokens / context, new=context, context=context)
    return _timed(step, 32, device, placing, hides, formats)


def _write(
    texts: float,
    context: float,
    ranks: int,
    device: str,
    placing: str = "refined",
    *,
    hides: bool = True,
    new: int = 1,
    formats: str = "fp8",
) -> Timed:
    """A step that writes, `texts` on each device."""
    step = Step(kind="decode", texts=texts * ranks, new=new, context=context)
    return _timed(step, ranks, device, placing, hides, formats)


def _prefill() -> list[Case]:
    def case(what: str, tokens: float, disclosed: float, timed: Timed, assumed: str, source: str, group: str) -> Case:
        return Case(what, "tok/s/node", disclosed, lambda e: 8 * tokens / timed.seconds(e), assumed, source, group)

    pieces = "EP32, 16,384 tokens a GPU, two batches overlapped"
    recorded = f"{pieces}, EPLB on the recorded skew"
    return [
        *(
            case(
                f"SGLang prefill, {size // 1024}K prompts",
                16384,
                rate,
                _read(16384, size, "h100"),
                recorded,
                LMSYS,
                "sglang",
            )
            for size, rate in ((1024, 57674), (2048, 54543), (4096, 50302))
        ),
        case(
            "SGLang prefill, 4K, perfect EPLB",
            16384,
            59337,
            _read(16384, 4096, "h100", "even"),
            pieces,
            LMSYS,
            "sglang",
        ),
        case(
            "DeepSeek profile, prefill, 4K",
            16384,
            62713,
            _read(16384, 4096, "h800", "even"),
            pieces,
            PROFILE,
            "deepseek",
        ),
        case(
            "DeepSeek production, prefill without hits",
            16384,
            32206,
            _read(16384, 4989, "h800"),
            f"{recorded}; always busy",
            LMSYS,
            "deepseek",
        ),
    ]


def _decode() -> list[Case]:
    def case(
        what: str, texts: float, made: float, disclosed: float, timed: Timed, assumed: str, source: str, group: str
    ) -> Case:
        return Case(
            what, "tok/s/node", disclosed, lambda e: 8 * texts * made / timed.seconds(e), assumed, source, group
        )

    ep72 = "EP72, two batches overlapped, EPLB on the recorded skew"
    vllm = _write(256, 2048, 64, "h200")
    return [
        case("SGLang decode, 256 x 2K", 256, 1, 22282, _write(256, 2048, 72, "h100"), ep72, LMSYS, "sglang"),
        case(
            "SGLang decode, 128 x 4K, MTP",
            128,
            1.6,
            17373,
            _write(128, 4096, 72, "h100", new=2),
            f"{ep72}; 60 % of one draft accepted",
            LMSYS,
            "sglang",
        ),
        case(
            "DeepSeek profile, decode, 128 x 4K",
            128,
            1,
            18598,
            _write(128, 4096, 128, "h800", "even"),
            "EP128, all sending hidden",
            PROFILE,
            "deepseek",
        ),
        Case(
            "DeepSeek production, decode",
            "tok/s/node",
            14800,
            _production_decode(),
            "EP144, 4,989 tokens, the batch that gives users 21 tok/s",
            DAY_6,
            "deepseek",
        ),
        Case(
            "vLLM wide-EP on H200",
            "tok/s/GPU",
            2200,
            lambda e: 256 / vllm.seconds(e),
            "EP64, 256 x 2K (no batch disclosed)",
            "blog.vllm.ai, wide-EP [P]",
            "vllm",
        ),
    ]


def _production_decode() -> Callable[[Constants], float]:
    batches = np.geomspace(16, 400, 6)
    steps = [_write(batch, 4989, 144, "h800") for batch in batches]

    def predict(constants: Constants) -> float:
        rates = [1 / step.seconds(constants) for step in steps]  # falling, as batches grow
        batch = float(np.interp(-21, [-rate for rate in rates], batches))
        return 8 * batch * float(np.interp(batch, batches, rates))

    return predict


def _gains() -> list[Case]:
    def case(what: str, disclosed: float, slow: Timed, fast: Timed, assumed: str, source: str, group: str) -> Case:
        return Case(what, "x", disclosed, lambda e: slow.seconds(e) / fast.seconds(e), assumed, source, group)

    fp4 = "same batches; experts in 4 bits, cache in 8 [M]"
    skew, third = "recorded skew of DeepSeek-V2-Lite", "third-party report [3]"
    read, write = _read(16384, 4096, "h100"), _write(256, 2048, 72, "h100")
    alone = _read(16384, 4096, "h100", hides=False)
    return [
        case("EPLB's gain, prefill", 1.49, _read(16384, 4096, "h100", "in_order"), read, skew, LMSYS, "sglang"),
        case("EPLB's gain, decode", 2.54, _write(256, 2048, 72, "h100", "in_order"), write, skew, LMSYS, "sglang"),
        case("Two-batch overlap's gain, prefill", 1.31, alone, read, "27-35 % stated", LMSYS, "sglang"),
        case(
            "Two-batch overlap's gain, decode, 256",
            1.255,
            _write(256, 2048, 72, "h100", hides=False),
            write,
            "the same with nothing hidden",
            LMSYS,
            "sglang",
        ),
        case("GB200 over H100, prefill", 3.8, read, _read(16384, 4096, "gb200", formats=FP4), fp4, third, "gb200"),
        case("GB200 over H100, decode", 4.8, write, _write(256, 2048, 72, "gb200", formats=FP4), fp4, third, "gb200"),
    ]


def _training() -> list[Case]:
    v3 = trained("deepseek-v3", "h800", "fp8", 4096, 64, pipeline=(16, 120))
    hour = 3600.0

    def case(
        what: str, unit: str, disclosed: float, name: str, number: str, tokens: float, per: float, source: str
    ) -> Case:
        ranks = 1 if name == "olmoe-1b-7b" else 8
        run = trained(name, "h100", number, 4096 if ranks == 1 else 8192, ranks)
        assumed = f"{'EP8' if ranks > 1 else 'FSDP'}, {number}, {tokens / 1e12:g}T tokens, nothing idle"
        return Case(what, unit, disclosed, lambda e: tokens * run(e) / per, assumed, source, what.split()[0].lower())

    return [
        Case(
            "DeepSeek-V3, a trillion tokens",
            "K GPU-h",
            180.0,
            lambda e: 1e12 * v3(e) / hour / 1e3,
            "PP16 EP64, 120 micro-batches, DualPipe's bubble",
            V3_REPORT,
            "deepseek",
        ),
        case(
            "OLMoE-1B-7B on 256 H100", "days", 10.0, "olmoe-1b-7b", "bf16", 5.133e12, 86400 * 256, "OLMoE; 10 days [M]"
        ),
        case("Llama 4 Scout", "M GPU-h", 5.0, "llama-4-scout", "bf16", 40e12, hour * 1e6, LLAMA_4),
        case("Llama 4 Maverick", "M GPU-h", 2.38, "llama-4-maverick", "bf16", 22e12, hour * 1e6, LLAMA_4),
        Case(
            "GShard 2048E 36L, 1T tokens",
            "days",
            4.0,
            _gshard,
            "4M tokens a step on both sides together, dispatch by einsum",
            GSHARD,
            "gshard",
        ),
    ]


def trained(
    name: str,
    device: str,
    number: str,
    sequence: int,
    ranks: int,
    *,
    pipeline: tuple[int, int] = (1, 1),
) -> Callable[[Constants], float]:
    """Device seconds of one token: a forward pass and a backward one of twice its length, and sending for both.

    pipeline: stages S and micro-batches M; DualPipe leaves (S/2 - 1)(pair + B - 3W) of idle time besides M pairs of
    chunks (DeepSeek-V3, table 2), where B takes two and W one forward chunk's computing.
    """
    config, formats, found = _model(name), named(number), find_device(device)
    step = Step(kind="prefill", texts=ranks, new=sequence, context=sequence)
    layout = Layout(dp=ranks, ep=ranks)
    head = Op("head", 0.0, 0.0, 0.0, 2.0 * config.vocab_size * config.hidden_size * sequence, "bf16", 1)
    ops = (*(op for op in step_ops(config, formats, step, layout) if op.name != "head"), head)
    timed = Timed(ops, step_traffic(config, formats, step, layout, found), found)
    stages, micro_batches = pipeline

    def seconds(constants: Constants) -> float:
        working, sending = timed.working(constants.compute) / constants.training, timed.sending / constants.network
        pair = max(3 * working, 2 * sending)
        idle = (stages / 2 - 1) * (pair - working) if stages > 1 else 0.0
        return (micro_batches * pair + idle) / micro_batches / sequence

    return seconds


_GSHARD = {"size": 1024, "inner": 8192, "experts": 2048, "layers": 36, "cores": 2048, "batch": 4e6, "heads": 2048}


def _gshard(constants: Constants) -> float:
    """Days for a trillion tokens. Half of the layers read, half write; of either half every other one is an MoE; a
    token dispatched by einsum meets all its group's slots (GShard, sec. 3.2), 2 a token of the group."""
    size, inner, layers = _GSHARD["size"], _GSHARD["inner"], _GSHARD["layers"]
    group = _GSHARD["batch"] / _GSHARD["cores"]
    attention, block = 4 * size * _GSHARD["heads"], 2 * size * inner
    # Per token of either side: its own stack of layers / 2, cross attention on the writing side, and the head there.
    dense = layers / 2 * attention * 1.25 + layers / 4 * block + 64000 * size / 2
    experts = layers / 4 * 2 * block + layers / 4 * size * _GSHARD["experts"]
    dispatch = layers / 4 * 2 * (2 * group * size)
    flops = 3 * 2 * (dense + experts + dispatch) * _GSHARD["batch"]
    core = find_device("tpu-v3").rate("bf16") / 2
    step = flops / (_GSHARD["cores"] * core * constants.compute * constants.training)
    return step * 1e12 / _GSHARD["batch"] / 86400
