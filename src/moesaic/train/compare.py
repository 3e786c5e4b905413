"""An MoE beside its dense twins on the same batches: the models, how far they are trained, and their numbers."""

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from moesaic.config import ModelConfig
from moesaic.data.loader import Packed
from moesaic.engine.generate import generate
from moesaic.evaluate.perplexity import HeldOutLoss, held_out_load, held_out_loss
from moesaic.hub.saving import SavesItself
from moesaic.kernels.devices import device_of
from moesaic.models.build import decoder_only
from moesaic.models.decoder import Decoder
from moesaic.telemetry.load import StepLoad
from moesaic.telemetry.report_data import HeldOut, ModelResult
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
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "intermediate_size": 256,
    "norm_topk_prob": True,
    "rope_theta": 10_000.0,
}

EVALUATIONS = 8  # of each model on its way
FINAL_TOKENS = 16_384  # of each domain, for the numbers in the table
LOAD_TOKENS = 4096  # of each domain, for who serves which domain
DECODED_TOKENS = 96


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


def evaluation_steps(settings: TrainSettings, packed: Packed) -> float:
    """What one model's evaluations cost, in training steps: a token costs a third of what training on it does."""
    tokens = (EVALUATIONS + 1) * settings.evaluate_tokens + FINAL_TOKENS + LOAD_TOKENS
    return tokens * len(packed.domains) / settings.tokens_per_step / 3


def train_contender(
    contender: Contender,
    settings: TrainSettings,
    packed: Packed,
    *,
    listener: Listener | None = None,
    run: RunFolder | None = None,
    tokenizer: SavesItself | None = None,
    final_tokens: int = FINAL_TOKENS,
) -> Outcome:
    """Train, evaluate on `final_tokens` held-out tokens of each domain, and decode."""
    reset_peak_memory(device_of(settings.device, "train.device"))
    trainer = Trainer(
        Decoder(contender.config).initialize(settings.seed),
        settings,
        packed,
        run=run,
        tokenizer=tokenizer,
        stop_after=contender.steps,
    )
    history = trainer.train(listener)
    peak = peak_memory_bytes(trainer.device)
    model = decoder_only(trainer.final_model(), "the comparison with twins").eval()
    seen: dict[str, Any] = {
        "sequence_length": settings.sequence_length,
        "document_attention": trainer.data.document_attention,
    }
    final = held_out_loss(model, packed, max_tokens=final_tokens, **seen)
    return Outcome(
        result=_result(contender, settings, packed, history, model, final, peak),
        model=model,
        loads=tuple(report.load for report in history.steps) if contender.config.moe_layers else (),
        domain_load=held_out_load(model, packed, max_tokens=LOAD_TOKENS, **seen),
    )


def _result(
    contender: Contender,
    settings: TrainSettings,
    packed: Packed,
    history: History,
    model: Decoder,
    final: HeldOutLoss,
    peak: int,
) -> ModelResult:
    config, last, gap = contender.config, history.steps[-1], history.evaluations[-1].capacity_gap
    # A token of a sequence sees half of it on average; a backward pass costs two forward passes.
    flops_per_token = 3 * config.flops_per_token(settings.sequence_length // 2)
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
        capacity_gap=math.nan if gap is None else gap,
    )


def decoding_rate(model: Decoder, start_id: int, num_tokens: int = DECODED_TOKENS) -> float:
    """Tokens per second of one greedy stream, the prompt's one token included, after a short warm-up."""
    generate(model, [start_id], 8, eos_token_ids=())
    started = time.perf_counter()
    generate(model, [start_id], num_tokens, eos_token_ids=())
    return num_tokens / (time.perf_counter() - started)


def with_steps(settings: TrainSettings, steps: int, evaluations: int = EVALUATIONS) -> TrainSettings:
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
        batch_size=4,
        sequence_length=256,
        learning_rate=5e-3,
        warmup_steps=40,
        # Strong: in so few steps a weak one lets experts die before it has pulled them back (LOG.md).
        balance_losses=(("switch", 0.2),),
        evaluate_tokens=2048,
        seed=seed,
    )
