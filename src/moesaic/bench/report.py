"""What `moesaic bench` says, as one JSON-ready document."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from moesaic.bench.bound import Bound, Held, bound
from moesaic.bench.machine import Machine
from moesaic.bench.reached import Case, Sample, median

ROUTING = "router"
"""What the engine calls the part that chooses experts and sorts rows by them."""


def report(machine: Machine, kept: Held, cases: Sequence[Case]) -> dict[str, Any]:
    """The machine, what is held, and a row for each case. What varies from sample to sample is {median, low, high}."""
    bandwidths = [sample.bandwidth for case in cases for sample in case.samples]
    return {
        "machine": machine._asdict() | {"bandwidth": _spread(bandwidths)},
        "held": {
            "packed_bytes": dict(kept.packed_bytes),
            "formats": dict(kept.formats),
            "bits_per_weight": round(8 * sum(kept.packed_bytes.values()) / _packed_weights(kept), 3),
            "products": {"experts": kept.of_experts, "head": kept.of_head, "others": kept.of_others},
        },
        "cases": [_case(case, machine) for case in cases],
    }


def _case(case: Case, machine: Machine) -> dict[str, Any]:
    def limit(sample: Sample) -> Bound:
        return bound(case.work, sample.bandwidth, machine.peaks)

    def spread(of: Callable[[Sample], float]) -> dict[str, float]:
        return _spread([of(sample) for sample in case.samples])

    limits = [limit(sample).by for sample in case.samples]
    parts = sorted({part for sample in case.samples for part in sample.parts})
    return {
        "case": case.name,
        "tokens": case.tokens,
        "steps_per_sample": case.steps,
        "samples": len(case.samples),
        "seconds": spread(lambda sample: sample.seconds),
        "tokens_per_second": spread(lambda sample: case.tokens / sample.seconds),
        "bound_tokens_per_second": spread(lambda sample: case.tokens / limit(sample).seconds),
        "bound_by": statistics.mode(limits),
        "fraction": spread(lambda sample: limit(sample).seconds / sample.seconds),
        "bytes": round(case.work.num_bytes),
        "operations": {number: round(count) for number, count in case.work.operations.items()},
        "shares": {part: median(case, lambda sample, part=part: _share(sample, part)) for part in parts},
        "outside_kernels": median(case, lambda sample: sample.outside / sample.seconds),
        "routing": median(case, lambda sample: _share(sample, ROUTING)),
    }


def _share(sample: Sample, part: str) -> float:
    return sample.parts.get(part, 0.0) / sample.seconds


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _packed_weights(kept: Held) -> int:
    """Of the matrices that the packed bytes are of: the head once more where it is the embedding's table, too."""
    config = kept.config
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return sum(spec.numel for spec in config.parameters() if len(spec.shape) > 1) - looked_up
