"""How should a Mixture-of-Experts be cut? Small models on real text, with the same number of active parameters.

One model (32 experts, 4 a token, the Switch loss at 0.01, dropless) and what happens when one thing is changed:

  choices      1, 2, 4 or 8 experts a token of 32, as much narrower: total parameters shrink with them
  granularity  8 wide to 64 narrow experts, of which an eighth are active: total parameters stay
  shared       one of the four experts a token is shared, so that every token passes it
  capacity     1.0, 1.25, 2.0 or without limit, each at three strengths of the balance loss
  skewed       a router that sends 80% of the tokens to one expert, beside the same one left even

What one expert a token is weighed by must not be divided by itself, so top-1 is Switch's. The skewed router is forced
from outside: after every step the selection bias of expert 0 is steered until it has 80% of the rows. Held-out loss is
dropless; the gap is what it loses with the capacity of training. Drop rates and speed are those of training. Speed is
what this machine did at the time: compare it only where nothing else ran.

A finished cell is remembered in --out; the same command goes on after a stop.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scatter import Dot, scatter
from studies import Cell, Result, Study, by_cell, conduct, spread, write_picture

from moesaic.cli import output
from moesaic.layers.moe import MoeLayer
from moesaic.train.loop import Trainer
from moesaic.train.reports import StepReport

EXAMPLE = "python benchmarks/design_study.py --corpus my-texts --out design_study"
STEPS = 200
ACTIVE_WIDTH = 192  # inner channels that a token passes in a layer, over all its experts
BASE = "4 of 32"
SKEW = 0.8  # of the rows, for the expert that is preferred
FACTORS = (1.0, 1.25, 2.0, None)
COEFFICIENTS = (0.0, 0.01, 0.1)


def recipe(steps: int) -> dict[str, Any]:
    """The study's model and training."""
    return {
        "vocab_size": 4096,
        "model": {
            "model_type": "moesaic",
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": ACTIVE_WIDTH // 4,
            "router": "softmax_topk",
        },
        "train": {
            "steps": steps,
            "batch_size": 24,
            "sequence_length": 128,
            "learning_rate": 5e-3,
            "schedule": "wsd",
            "decay_fraction": 0.25,
            "balance_losses": [["switch", 0.01]],
        },
        "data": {"weights": "uniform"},
    }


def study(steps: int) -> Study:
    """The variants, grouped by their names (see SECTIONS)."""
    return Study(recipe(steps), [*_cuts(), *_capacities(), *_skewed()])


def _experts(num_experts: int, top_k: int, **more: Any) -> dict[str, Any]:
    """Fields of experts that are together as wide as the study's."""
    router = {"router": "switch"} if top_k == 1 else {}
    sizes = {"num_experts": num_experts, "num_experts_per_tok": top_k, "moe_intermediate_size": ACTIVE_WIDTH // top_k}
    return {**sizes, **router, **more}


def _cuts() -> list[Cell]:
    shapes = [(32, 4), (32, 1), (32, 2), (32, 8), (8, 1), (16, 2), (64, 8)]
    narrow = ACTIVE_WIDTH // 4
    shared = {"num_experts_per_tok": 3, "moe_intermediate_size": narrow, "shared_intermediate_size": narrow}
    return [
        *(Cell(f"{top_k} of {count}", _experts(count, top_k)) for count, top_k in shapes),
        Cell("3 + shared", shared),
    ]


def _capacities() -> list[Cell]:
    """The base has no limit and the coefficient 0.01; all other pairs."""
    return [
        Cell(
            _capacity_name(factor, coefficient),
            {} if factor is None else {"capacity": {"factor": factor}},
            {"balance_losses": [["switch", coefficient]] if coefficient else []},
        )
        for factor in FACTORS
        for coefficient in COEFFICIENTS
        if _capacity_name(factor, coefficient) != BASE
    ]


def _capacity_name(factor: float | None, coefficient: float) -> str:
    if (factor, coefficient) == (None, 0.01):
        return BASE
    return f"{'dropless' if factor is None else f'capacity {factor}'}, loss {coefficient:g}"


def _skewed() -> list[Cell]:
    router = {"name": "sigmoid_topk", "renormalize": False, "selection_bias": True}
    model = _experts(32, 1, router=router)
    even = {"balance_losses": [], "selection_bias_rate": 0.003}
    skewed = {"balance_losses": [], "selection_bias_rate": 0.0}
    return [
        Cell("1 of 32, kept even", model, even),
        Cell("1 of 32, 80% to one", model, skewed, "forced", prefer_one),
    ]


def prefer_one(trainer: Trainer, report: StepReport) -> None:
    """Steer the selection bias of every layer's expert 0, so that it gets 80% of the rows."""
    loads = {layer.layer: layer.counts_E for layer in report.load.layers}
    for module in trainer.model.modules():
        if isinstance(module, MoeLayer):
            counts_E, bias_E = loads[module.layer], module.router.selection_bias
            assert bias_E is not None
            bias_E[0] += 0.05 * (SKEW - float(counts_E[0]) / float(counts_E.sum()))


SECTIONS: dict[str, Sequence[str]] = {
    "experts a token, of 32": ("1 of 32", "2 of 32", BASE, "8 of 32"),
    "granularity, an eighth active": ("1 of 8", "2 of 16", BASE, "8 of 64"),
    "a shared expert": (BASE, "3 + shared"),
    "capacity and balance": [_capacity_name(factor, each) for factor in FACTORS for each in COEFFICIENTS],
    "80% to one expert": ("1 of 32", "1 of 32, kept even", "1 of 32, 80% to one"),
}


def show(results: list[Result], out: Path) -> None:
    """A table a section, and loss against balance, drop rate and speed."""
    grouped = by_cell(results)
    columns = ["cell", "bits/byte", "MaxVio", "dropped", "gap", "tokens/s", "dead", "total", "active", "seeds"]
    for title, names in SECTIONS.items():
        rows = [_row(name, grouped[name]) for name in names if name in grouped]
        if rows:
            output.write(output.plain_table(columns, rows, title) + "\n")
    for file, field, label, least in (
        ("balance.svg", "max_violation", "MaxVio over the held-out text", 1e-3),
        ("dropped.svg", "dropped", "share of the rows dropped in training (0.001 and less at the left)", 1e-3),
        ("speed.svg", "tokens_per_s", "training tokens a second", 1.0),
    ):
        dots = [
            Dot(name, [(max(one[field], least), one["bits_per_byte"]) for one in of], bool(of[0]["note"]))
            for name, of in grouped.items()
        ]
        picture = scatter(
            dots, title=f"Held-out loss at equal active parameters: {field}", x_label=label, y_label="bits per byte"
        )
        write_picture(out / file, picture)


def _row(name: str, results: list[Result]) -> list[str]:
    return [
        name,
        spread(results, "bits_per_byte").text(4),
        spread(results, "max_violation").text(2),
        f"{spread(results, 'dropped').mean:.1%}",
        "-" if results[0]["capacity_gap"] is None else f"{spread(results, 'capacity_gap').mean:.4f}",
        f"{spread(results, 'tokens_per_s').mean:.0f}",
        str(sum(one["dead_experts"] for one in results)),
        output.number(results[0]["total"]),
        output.number(results[0]["active"]),
        str(len(results)),
    ]


if __name__ == "__main__":
    conduct(__doc__, EXAMPLE, study, show, steps=STEPS, seeds=[0])
