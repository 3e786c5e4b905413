"""What samples add up to: bounds, medians and ranges, and the table that shows them."""

import statistics
from collections.abc import Sequence
from typing import Any

from contender import Case, Contender

from moesaic.bench.bound import Held, Number, bound, decode_work, prefill_work
from moesaic.bench.machine import Machine
from moesaic.cli import output
from moesaic.config import ModelConfig

CONTEXT = {1: 96}  # tokens that a decode case's texts have on average, while they are written (worker.py)
CONTEXT_OF_MANY = 48


def add_bounds(
    samples: Sequence[dict[str, Any]], contenders: Sequence[Contender], config: ModelConfig, machine: Machine
) -> None:
    """To each sample the tokens a second that its own bandwidth allows, and the fraction of them that it reached."""
    kept = {contender.name: _held(config, contender) for contender in contenders}
    for sample in samples:
        case = Case.named(sample["case"])
        held = kept[f"{sample['engine']} {sample['variant']}"]
        if case.kind == "prefill":
            work = prefill_work(held, case.size)
        else:
            work = decode_work(held, case.size, CONTEXT.get(case.size, CONTEXT_OF_MANY))
        sample["bound"] = case.size / bound(work, sample["bandwidth"], machine.peaks).seconds
        sample["fraction"] = sample["tokens_per_second"] / sample["bound"]


def _held(config: ModelConfig, contender: Contender) -> Held:
    sizes = contender.packed_bytes()
    of_bits: Number = "bf16" if "bf16" in contender.variant else "int8"
    return Held(
        config=config,
        packed_bytes=sizes,
        embedding_element_bytes=2,
        cache_format="bf16",
        of_experts=of_bits,
        of_head=of_bits,
        of_others=of_bits,
    )


def summarize(
    samples: Sequence[dict[str, Any]], contenders: Sequence[Contender], cases: Sequence[Case], config: ModelConfig
) -> list[dict[str, Any]]:
    """A row for each contender: bits of a weight, and for each case medians and ranges."""
    rows = []
    for contender in contenders:
        own = [each for each in samples if (each["engine"], each["variant"]) == (contender.engine, contender.variant)]
        bits = 8 * sum(contender.packed_bytes().values()) / (config.total - config.vocab_size * config.hidden_size)
        row: dict[str, Any] = {"engine": contender.engine, "variant": contender.variant, "bits_per_weight": bits}
        rows.append(row | {case.name: _summary(own, case) for case in cases})
    return rows


def _summary(samples: Sequence[dict[str, Any]], case: Case) -> dict[str, float] | None:
    own = [sample for sample in samples if sample["case"] == case.name]
    if not own:
        return None
    speeds = [sample["tokens_per_second"] for sample in own]
    return {
        "median": statistics.median(speeds),
        "low": min(speeds),
        "high": max(speeds),
        "fraction": statistics.median(sample["fraction"] for sample in own),
        "samples": len(own),
    }


def print_table(
    model: str, machine: Machine, rows: Sequence[dict[str, Any]], cases: Sequence[Case], samples: Sequence[Any]
) -> None:
    """To stdout, with what the machine gave meanwhile."""
    speeds = [sample["bandwidth"] for sample in samples]
    memory = (
        f"memory {output.size(statistics.median(speeds))}/s ({output.size(min(speeds))} - {output.size(max(speeds))})"
    )
    peaks = ", ".join(f"{number} {output.number(peak)}" for number, peak in machine.peaks.items() if peak)
    title = f"model {model}; {machine.processor}, {machine.threads} threads; {memory}; operations a second: {peaks}"
    cells = [
        [row["engine"], row["variant"], f"{row['bits_per_weight']:.2f}", *(_cell(row[case.name]) for case in cases)]
        for row in rows
    ]
    output.table(("engine", "format", "bits", *(f"{case.name}, tokens/s" for case in cases)), cells, title)
    output.write("each: median (range) and the fraction of what its bytes and this machine allow\n")


def _cell(summary: dict[str, float] | None) -> str:
    if summary is None:
        return "-"
    return f"{summary['median']:.1f} ({summary['low']:.1f} - {summary['high']:.1f}) {summary['fraction']:.0%}"
