"""What keeps experts evenly loaded, and what does it cost? One small model on real text, balanced in many ways.

Each cell trains the same model (32 experts, 4 a token) on the same batches with another router or balancer, and is
then judged on held-out text: bits per byte (evaluation drops nothing), and MaxVio, by how much the busiest expert of a
layer exceeds the mean load (arXiv:2408.15664; 0 is even), over all held-out tokens, averaged over layers. Training
and held-out text have the same share of every domain, so that a bias learnt on the one is fair on the other.

The sign rule of auxiliary-loss-free balancing moves a bias by its rate a step: 0.001 in the paper's 40 000 steps,
where it may travel 40. In this study's few hundred steps it must travel as far as the scores of its experts are apart,
some tenths: rates are larger for it. They fall to 0 over the last quarter, with the learning rate, or biases would
end in a random walk as wide as they are quick. But while the router still learns, slow biases cannot follow it: other
cells let them fall earlier and later.

A finished cell is remembered in --out; the same command goes on after a stop.
"""

from pathlib import Path
from typing import Any

from scatter import Dot, scatter
from studies import Cell, Result, Study, by_cell, conduct, spread, write_picture

from moesaic.cli import output

EXAMPLE = "python benchmarks/balance_study.py --corpus my-texts --out balance_study --seeds 0 1 2"
STEPS = 300
EVEN = 0.1  # the MaxVio that the loss-free method is said to reach


def recipe(steps: int) -> dict[str, Any]:
    """The study's model and training. Four micro-batches a step, so that the scope of a balance loss matters."""
    return {
        "vocab_size": 4096,
        "model": {
            "model_type": "moesaic",
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 48,
            "router": "softmax_topk",
        },
        "train": {
            "steps": steps,
            "micro_batches": 4,
            "batch_size": 6,
            "sequence_length": 128,
            "learning_rate": 5e-3,
            "schedule": "wsd",
            "decay_fraction": 0.25,
            "balance_losses": [],
        },
        "data": {"weights": "uniform"},
    }


def study(steps: int) -> Study:
    """The ways to balance."""
    sigmoid, biased = {"name": "sigmoid_topk"}, {"name": "sigmoid_topk", "selection_bias": True}
    proportional = {"selection_bias_rule": "proportional"}
    soft = {"name": "softmax_topk", "selection_bias": True}

    def rate(value: float, falls_from: float = 0.75) -> dict[str, Any]:
        return {"selection_bias_rate": [[0, value], [round(falls_from * steps), value], [steps, 0.0]]}

    def loss(*pairs: tuple[str, float]) -> dict[str, Any]:
        return {"balance_losses": [list(pair) for pair in pairs]}

    cells = [
        Cell("none"),
        Cell("switch 0.001", train=loss(("switch", 0.001))),
        Cell("switch 0.01", train=loss(("switch", 0.01))),
        Cell("switch 0.1", train=loss(("switch", 0.1))),
        Cell("z-loss 0.001", train=loss(("router_z", 0.001))),
        Cell("per document 0.01", train=loss(("sequence", 0.01))),
        Cell("sigmoid, switch 0.01", {"router": sigmoid}, loss(("switch", 0.01))),
        Cell("aux-free 0.003", {"router": biased}, rate(0.003)),
        Cell("aux-free 0.01", {"router": biased}, rate(0.01)),
        Cell("aux-free proportional 0.01", {"router": biased}, {**rate(0.01), **proportional}),
        Cell("global batch 0.01", train=loss(("global_running", 0.01))),
        Cell("noisy top-k", {"router": "noisy_topk"}, loss(("importance", 0.1), ("load", 0.1))),
        Cell("expert choice", {"router": "expert_choice"}, note="leaks the future: its loss is not comparable"),
        Cell("hash", {"router": {"name": "hash", "table": "balanced"}}),
        Cell("aux-free 0.01, falls early", {"router": biased}, rate(0.01, 0.5)),
        Cell("aux-free 0.01, falls late", {"router": biased}, rate(0.01, 0.9)),
        Cell("aux-free 0.02, falls late", {"router": biased}, rate(0.02, 0.9)),
        Cell("aux-free 0.01, falls last", {"router": biased}, rate(0.01, 0.97)),
        Cell("aux-free 0.03, falls late", {"router": biased}, rate(0.03, 0.9)),
        Cell("aux-free softmax 0.003, falls late", {"router": soft}, rate(0.003, 0.9)),
        Cell("aux-free softmax 0.006, falls late", {"router": soft}, rate(0.006, 0.9)),
        Cell("aux-free proportional 0.05, falls late", {"router": biased}, {**rate(0.05, 0.9), **proportional}),
    ]
    return Study(recipe(steps), cells)


AUXILIARY = ("switch", "per document", "sigmoid, switch", "global batch", "noisy")


def show(results: list[Result], out: Path) -> None:
    """The table, the plot, and what came of the loss-free method."""
    grouped = by_cell(results)
    rows = [
        [
            name,
            spread(of, "bits_per_byte").text(4),
            spread(of, "max_violation").text(),
            f"{max(max(one['max_violation_by_layer']) for one in of):.2f}",
            spread(of, "batch_max_violation").text(2),
            str(sum(one["dead_experts"] for one in of)),
            str(len(of)),
            of[0]["note"],
        ]
        for name, of in grouped.items()
    ]
    columns = ["cell", "bits/byte", "MaxVio", "worst layer", "of a batch", "dead", "seeds", ""]
    output.write(output.plain_table(columns, rows))
    dots = [
        Dot(name, [(max(one["max_violation"], 0.01), one["bits_per_byte"]) for one in of], bool(of[0]["note"]))
        for name, of in grouped.items()
    ]
    picture = scatter(
        dots,
        title="Held-out loss against balance (hollow: not comparable)",
        x_label="MaxVio over the held-out text: 0 is even (0.01 and less at the left)",
        y_label="held-out bits per byte",
    )
    write_picture(out / "balance.svg", picture)
    output.write(verdict(results))


def verdict(results: list[Result]) -> str:
    """Whether the loss-free method is even, and no worse than the best auxiliary loss."""
    means = {
        name: (spread(of, "bits_per_byte").mean, spread(of, "max_violation").mean)
        for name, of in by_cell(results).items()
    }
    free = {name: mean for name, mean in means.items() if name.startswith("aux-free")}
    losses = {name: mean for name, mean in means.items() if name.startswith(AUXILIARY)}
    if not free or not losses:
        return ""
    best = min(losses, key=lambda name: losses[name][0])
    ours = min(free, key=lambda name: (free[name][1] > EVEN, free[name][0]))
    even = "reaches" if free[ours][1] <= EVEN else "does not reach"
    worse = free[ours][0] - losses[best][0]
    than = "no worse than" if worse <= 0 else f"{worse:.4f} worse than"
    return (
        f"{ours} {even} MaxVio {EVEN} ({free[ours][1]:.3f}) at {free[ours][0]:.4f} bits per byte, {than} the best "
        f"auxiliary loss ({best}: {losses[best][0]:.4f} at MaxVio {losses[best][1]:.3f})\n"
    )


if __name__ == "__main__":
    conduct(__doc__, EXAMPLE, study, show, steps=STEPS, seeds=[0, 1, 2])
