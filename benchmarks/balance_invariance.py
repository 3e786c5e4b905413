"""Whether balance losses keep their strength however a step is cut, ours and transformers': a table for LOG.md.

A small model in fp64 makes one step of the same documents in one piece, in micro-batches, over gloo ranks, padded on
either side, between rows of padding, packed and recomputed. Shown is how many times the whole step's gradient of the
balance loss alone is in the gradient of each (1.000: unchanged), and the largest difference of any number in it. The
same for a step of identical micro-batches, beside Mixtral in transformers, whose Trainer divides the cross-entropy by
the step's targets and the balance loss by nothing.

    python -m benchmarks.balance_invariance [--ranks 2 4] [--json]
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from tests.parallel.gloo import on_ranks
from tests.train.invariance import (
    EXACT,
    Steps,
    batch_of,
    cut,
    difference,
    one_step,
    ratio,
    rows,
    settings_of,
    without_targets,
)

LOSSES = (*EXACT, "global_running", "switch")


class Line(NamedTuple):
    """One way to cut a step. value: the loss, over that of the whole step; gradient: the same of its gradient."""

    loss: str
    cut: str
    value: float
    gradient: float
    difference: float


def compared(name: str, way: str, found: dict[str, Any], whole: dict[str, Any]) -> Line:
    """A step against the whole one."""
    return Line(
        name,
        way,
        found["balance"][name] / whole["balance"][name],
        ratio(found["gradients"], whole["gradients"]),
        difference(found["gradients"], whole["gradients"]),
    )


def in_one_process(name: str, whole: dict[str, Any]) -> Iterator[Line]:
    """Micro-batches, recomputation, padding, packing."""
    plain = settings_of(name)
    for num_parts in (2, 4, 8):
        found = one_step(plain, cut(without_targets(rows("right")), num_parts))
        yield compared(name, f"{num_parts} micro-batches", found, whole)
    found = one_step(settings_of(name, recompute="layers"), cut(without_targets(rows("right")), 4))
    yield compared(name, "4 micro-batches, recomputed", found, whole)
    for layout, what in (("left", "padded left"), ("empty", "rows of padding between"), ("packed", "packed in pairs")):
        found = one_step(plain, cut(without_targets(rows(layout)), 2))
        yield compared(name, f"2 micro-batches, {what}", found, whole)


def over_ranks(size: int, wholes: dict[str, dict[str, Any]]) -> Iterator[Line]:
    """Every rank's part of the rows in two micro-batches."""
    steps = Steps(without_targets(rows("right")), [(settings_of(name), 2) for name in LOSSES])
    first, *_ = on_ranks(size, "tests.train.invariance:on_rank", steps)
    for name, found in zip(LOSSES, first, strict=True):
        yield compared(name, f"{size} ranks, 2 micro-batches", found, wholes[name])


def identical(number: int) -> dict[str, float]:
    """The gradient of a step of identical micro-batches over that of one of them, by loss."""
    part = batch_of(without_targets(rows("right")))
    ratios = {}
    for name in LOSSES:
        once, found = (one_step(settings_of(name), [part] * times)["gradients"] for times in (1, number))
        ratios[name] = ratio(found, once)
    return {**ratios, "transformers (Mixtral)": _mixtral(number)}


def _mixtral(number: int) -> float:
    """transformers: as trainer.py has it, the loss is divided by the step's targets inside the model, then nowhere."""
    once, found = (_mixtral_gradient(times, 1.0) - _mixtral_gradient(times, 0.0) for times in (1, number))
    return float((found * once).sum() / once.square().sum())


def _mixtral_gradient(number: int, coefficient: float) -> torch.Tensor:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=coefficient,
        initializer_range=0.3,
    )
    config._experts_implementation = "eager"  # the others take no fp64
    model = MixtralForCausalLM(config).double().train()
    tokens = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(1))
    num_items = number * tokens[:, 1:].numel()
    for _ in range(number):
        model(input_ids=tokens, labels=tokens, num_items_in_batch=num_items).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "gate.weight" in name]
    assert gradients and all(gradient is not None for gradient in gradients)
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def main() -> None:
    """Print both tables, or one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="numbers of gloo ranks")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wholes = {name: one_step(settings_of(name), [batch_of(without_targets(rows("right")))]) for name in LOSSES}
    lines = [line for name in LOSSES for line in in_one_process(name, wholes[name])]
    lines += [line for size in args.ranks for line in over_ranks(size, wholes)]
    copies = {number: identical(number) for number in (2, 4)}
    if args.json:
        print(json.dumps({"cuts": [line._asdict() for line in lines], "identical": copies}))
        return
    print("| loss | step in | value | gradient | largest difference |\n|---|---|---|---|---|")
    for line in sorted(lines, key=lambda line: LOSSES.index(line.loss)):
        print(f"| {line.loss} | {line.cut} | {line.value:.6f} | {line.gradient:.6f} | {line.difference:.1e} |")
    print("\n| identical micro-batches | 2 | 4 |\n|---|---|---|")
    for name in copies[2]:
        print(f"| {name} | {copies[2][name]:.3f} | {copies[4][name]:.3f} |")


if __name__ == "__main__":
    main()
