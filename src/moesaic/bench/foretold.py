"""What a plan foretells of an engine's steps on this machine, beside what they take."""

import statistics
from collections.abc import Iterator, Sequence

from moesaic.bench.bound import Held
from moesaic.bench.reached import Case, Sample
from moesaic.config import ModelConfig
from moesaic.plan.flops import Step
from moesaic.plan.formats import Formats
from moesaic.plan.kernels import engine_step
from moesaic.plan.rates import KernelRates
from moesaic.plan.verify import Prediction
from moesaic.tensor_spec import ROLES, Role

_PARTS: dict[Role, str] = {
    "experts": "experts", "shared_experts": "shared experts", "attention": "projections", "mlp": "mlp", "head": "head",
}  # fmt: skip


def held_formats(kept: Held) -> Formats:
    """What an engine's matrices are of, by role."""
    wide = "bf16" if kept.embedding_element_bytes == 2 else "fp32"
    by_role: dict[Role, str] = dict.fromkeys(ROLES, wide)
    for role, part in _PARTS.items():
        if part in kept.formats:
            by_role[role] = "fp8-128" if kept.formats[part] == "fp8" else kept.formats[part]
    by_role["router"] = "fp32"
    return Formats(name="held", by_role=by_role, cache=kept.cache_format)


def step_of(case: Case, context: float) -> Step:
    """The plan's word for a case. context: tokens that its texts have, its new ones included."""
    if case.name.startswith("prefill"):
        return Step(kind="prefill", texts=1, new=case.tokens, context=case.tokens)
    return Step(kind="decode", texts=case.tokens, new=1, context=context)


def foretold_seconds(rates: KernelRates, kept: Held, step: Step, sample: Sample) -> float:
    """Of a step at the speeds around it."""
    config: ModelConfig = kept.config
    return engine_step(rates, config, held_formats(kept), step, speeds=sample.speeds).seconds


def predictions(
    rates: KernelRates, kept: Held, model: str, cases: Sequence[tuple[Case, float]]
) -> Iterator[Prediction]:
    """One for each case and its context: medians over its samples, each foretold at its own speeds."""
    for case, context in cases:
        step = step_of(case, context)
        foretold = statistics.median(foretold_seconds(rates, kept, step, sample) for sample in case.samples)
        yield Prediction(
            source="bench",
            model=model,
            quantity="prefill_s" if step.kind == "prefill" else "decode_s",
            predicted=foretold,
            measured=statistics.median(sample.seconds for sample in case.samples),
            setting={
                "case": case.name,
                "context": round(context),
                "formats": " ".join(sorted(set(kept.formats.values()))),
                "bandwidth": round(statistics.median(sample.bandwidth for sample in case.samples)),
            },
            machine=rates.machine,
        )
