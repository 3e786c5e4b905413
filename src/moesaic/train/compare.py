"""An MoE beside its dense twins on the same batches, and verdicts that are computed, never written down beforehand."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from moesaic.config import ModelConfig
from moesaic.data.loader import Packed
from moesaic.engine.generate import generate
from moesaic.evaluate.perplexity import held_out_load, held_out_loss
from moesaic.hub.saving import SavesItself
from moesaic.models.decoder import Decoder
from moesaic.telemetry.health import RouterHealth
from moesaic.telemetry.load import StepLoad, sum_loads
from moesaic.telemetry.report_data import HeldOut, ModelResult, Verdict
from moesaic.train.loop import History, Listener, Trainer
from moesaic.train.memory import peak_memory_bytes, reset_peak_memory
from moesaic.train.recipe import TrainSettings
from moesaic.train.resume import RunFolder
from moesaic.train.twins import dense_twin

# A model that learns something in minutes on two cores, in a public architecture. Sizes by experiment, see LOG.md.
DEMO_MODEL: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "intermediate_size": 256,
    "norm_topk_prob": True,
    "rope_theta": 10_000.0,
}

FINAL_TOKENS = 32_768  # of each domain, for the numbers in the table
DECODED_TOKENS = 96

Axis = Literal["tokens", "flops", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One model of the comparison and how far it is trained; all follow the same schedule."""

    name: str
    label: str
    config: ModelConfig
    steps: int


class Outcome(NamedTuple):
    """A trained contender: its numbers, the model, and what the router did (dense models: nothing)."""

    result: ModelResult
    model: Decoder
    loads: tuple[StepLoad, ...]
    domain_load: StepLoad


def contenders(moe: ModelConfig, steps: int, total_steps: int) -> tuple[Contender, Contender, Contender]:
    """The MoE, its twin of equal active and its twin of equal total parameters; the last may stop earlier."""
    return (
        Contender(name="MoE", label="MoE", config=moe, steps=steps),
        Contender(name="dense, equal active", label="active", config=dense_twin(moe, "active"), steps=steps),
        Contender(name="dense, equal total", label="total", config=dense_twin(moe, "total"), steps=total_steps),
    )


def step_seconds(config: ModelConfig, settings: TrainSettings, packed: Packed, repeats: int = 3) -> float:
    """The median seconds of a training step of a throw-away model, after one that warms up."""
    trainer = Trainer(Decoder(config).initialize(settings.seed), settings, packed)
    trainer.train_step()
    spent = []
    for _ in range(repeats):
        started = time.perf_counter()
        trainer.train_step()
        spent.append(time.perf_counter() - started)
    return sorted(spent)[repeats // 2]


def train_contender(
    contender: Contender,
    settings: TrainSettings,
    packed: Packed,
    *,
    listener: Listener | None = None,
    run: RunFolder | None = None,
    tokenizer: SavesItself | None = None,
) -> Outcome:
    """Train, evaluate on more held-out text, and decode."""
    reset_peak_memory()
    trainer = Trainer(
        Decoder(contender.config).initialize(settings.seed),
        settings,
        packed,
        run=run,
        tokenizer=tokenizer,
        stop_after=contender.steps,
    )
    history = trainer.train(listener)
    peak = peak_memory_bytes()
    model = trainer.model.eval()
    return Outcome(
        result=_result(contender, settings, packed, history, model, peak),
        model=model,
        loads=tuple(report.load for report in history.steps) if contender.config.moe_layers else (),
        domain_load=held_out_load(model, packed, sequence_length=settings.sequence_length, max_tokens=4096),
    )


def _result(
    contender: Contender, settings: TrainSettings, packed: Packed, history: History, model: Decoder, peak: int
) -> ModelResult:
    config, last = contender.config, history.steps[-1]
    # A token of a sequence sees half of it on average; a backward pass costs two forward passes.
    flops_per_token = 3 * config.flops_per_token(settings.sequence_length // 2)
    final = held_out_loss(model, packed, sequence_length=settings.sequence_length, max_tokens=FINAL_TOKENS)
    return ModelResult(
        name=contender.name,
        label=contender.label,
        note="" if contender.steps == settings.steps else f"stopped after {contender.steps} of {settings.steps} steps",
        total_parameters=config.total,
        active_parameters=config.active_gemm,
        bits_per_byte=final.bits_per_byte,
        domain_bits_per_byte=final.by_domain,
        training_tokens=last.tokens,
        training_tokens_per_s=last.tokens / last.seconds,
        decoding_tokens_per_s=decoding_rate(model, packed.eos_id),
        peak_memory_bytes=peak,
        training_time_s=last.seconds,
        training_flops=float(flops_per_token * last.tokens),
        held_out=tuple(
            HeldOut(
                step=e.step,
                tokens=e.tokens,
                flops=float(flops_per_token * e.tokens),
                seconds=e.seconds,
                bits_per_byte=e.loss.bits_per_byte,
            )
            for e in history.evaluations
        ),
        training_loss=tuple((float(report.tokens), report.loss) for report in history.steps),
    )


def decoding_rate(model: Decoder, start_id: int, num_tokens: int = DECODED_TOKENS) -> float:
    """Tokens per second of one greedy stream, the prompt's one token included, after a short warm-up."""
    generate(model, [start_id], 8, eos_token_ids=())
    started = time.perf_counter()
    generate(model, [start_id], num_tokens, eos_token_ids=())
    return num_tokens / (time.perf_counter() - started)


def bits_per_byte_at(result: ModelResult, axis: Axis, value: float) -> float:
    """The held-out curve at a number of tokens, FLOPs or seconds, linear between evaluations; NaN outside of it."""
    points = [(float(getattr(point, axis)), point.bits_per_byte) for point in result.held_out]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= value <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (value - x0) / (x1 - x0)
    return math.nan


def verdicts(moe: Outcome, active: ModelResult, total: ModelResult, last_steps: int = 20) -> tuple[Verdict, ...]:
    """What the run says, sentence by sentence."""
    ours = moe.result
    return (
        _at_equal("tokens", "tokens", ours, active, lambda x: f"{x / 1e6:.2f}M"),
        _at_equal("flops", "training compute", ours, active, lambda x: f"{x / 1e12:.1f} TFLOP"),
        _at_equal("seconds", "wall-clock", ours, active, lambda x: f"{x:.0f} s"),
        _between(ours, active, total),
        _domains(ours, active),
        _price(ours, active),
        _router(moe.loads[-last_steps:]),
    )


def _at_equal(axis: Axis, words: str, moe: ModelResult, dense: ModelResult, show: Callable[[float], str]) -> Verdict:
    """Both curves at the largest amount that both have spent."""
    value = min(float(getattr(moe.held_out[-1], axis)), float(getattr(dense.held_out[-1], axis)))
    ours, theirs = bits_per_byte_at(moe, axis, value), bits_per_byte_at(dense, axis, value)
    won = ours < theirs
    return Verdict(
        text=(
            f"At equal {words} ({show(value)}) the MoE {'beats' if won else 'loses to'} the dense model of equal active "
            f"parameters: {ours:.3f} against {theirs:.3f} bits per byte ({abs(1 - ours / theirs):.1%} "
            f"{'less' if won else 'more'})."
        ),
        is_good=won,
    )


def share_of_the_way(moe: float, active: float, total: float) -> float:
    """Where the MoE stands between its twins: 0 is the equal-active twin's loss, 1 the equal-total twin's."""
    return (active - moe) / (active - total) if active != total else math.nan


def _between(moe: ModelResult, active: ModelResult, total: ModelResult) -> Verdict:
    tokens = min(result.held_out[-1].tokens for result in (moe, active, total))
    ours, narrow, wide = (bits_per_byte_at(result, "tokens", tokens) for result in (moe, active, total))
    where = (
        f"{share_of_the_way(ours, narrow, wide):.0%} of the way from its equal-active to its equal-total twin"
        if wide < narrow
        else "with no way to measure: the equal-total twin is not ahead of the equal-active one yet"
    )
    return Verdict(
        text=(
            f"After the {tokens / 1e6:.2f}M tokens that all three have seen, the MoE ({ours:.3f} bits per byte) stands "
            f"{where} ({narrow:.3f} and {wide:.3f}); the equal-total twin needs "
            f"{total.training_flops / total.training_tokens / (moe.training_flops / moe.training_tokens):.1f}x "
            "the compute per token."
        ),
        is_good=None,
    )


def _domains(moe: ModelResult, active: ModelResult) -> Verdict:
    ahead = [name for name, bits in moe.domain_bits_per_byte.items() if bits < active.domain_bits_per_byte[name]]
    behind = [name for name in moe.domain_bits_per_byte if name not in ahead]
    tail = f"; behind in {', '.join(behind)}" if behind else ""
    return Verdict(
        text=f"The MoE is ahead of its equal-active twin in {len(ahead)} of {len(moe.domain_bits_per_byte)} domains{tail}.",
        is_good=len(ahead) > len(behind),
    )


def _price(moe: ModelResult, active: ModelResult) -> Verdict:
    training = moe.training_tokens_per_s / active.training_tokens_per_s
    decoding = moe.decoding_tokens_per_s / active.decoding_tokens_per_s
    return Verdict(
        text=(
            f"The price: {moe.total_parameters / active.total_parameters:.1f}x the parameters in memory, "
            f"{training:.2f}x the training speed and {decoding:.2f}x the decoding speed of the equal-active twin."
        ),
        is_good=None,
    )


def _router(loads: Sequence[StepLoad]) -> Verdict:
    health = RouterHealth.of(sum_loads(loads))
    return Verdict(
        text=f"The router over the last {len(loads)} steps: {health.verdict} (MaxVio {health.max_violation:.2f}).",
        is_good=health.is_healthy,
    )


def with_steps(settings: TrainSettings, steps: int, evaluations: int = 10) -> TrainSettings:
    """The same settings for a run of `steps` steps, evaluated about `evaluations` times."""
    return dataclasses.replace(
        settings,
        steps=steps,
        warmup_steps=min(settings.warmup_steps, max(1, steps // 10)),
        evaluate_every=max(1, steps // evaluations),
        checkpoint_every=max(1, steps // 2),
    )


def demo_settings(seed: int) -> TrainSettings:
    """How the demo trains; the number of steps comes from the time there is."""
    return TrainSettings(
        batch_size=8,
        sequence_length=256,
        learning_rate=5e-3,
        warmup_steps=40,
        evaluate_tokens=4096,
        seed=seed,
    )
