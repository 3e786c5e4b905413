"""Does the doctor mend a router that has collapsed, and leave a healthy one alone?

A small model is trained on real text until it works. Then the same moment goes on four ways: as it is (healthy), and
with one of four illnesses seeded into every routed layer; each without a doctor and with `doctor=act`:

  takeover     one expert's router row is scaled so that it wins every token with a probability near 1
  killed       a quarter of the experts get weights of 0 and a router row that no token follows
  identical    one expert becomes a copy of another: weights, router row and what the optimizer keeps
  doubled      every second expert becomes a copy of the one before it, as in a model whose experts were doubled without
               noise: a pair is always chosen together, gets the same gradients, and stays one expert for ever

One copy alone parts from its original by itself: where the two are second and third for a token only one is chosen.

Held-out bits per byte, and how many experts are dead, oversized or duplicates, are read at the end; a run is mended
when its loss is within the spread of the healthy seeds (or better), and nobody is ill. "clear after": the steps from
which on nobody was. Every continuation has the same batches and the same learning rate.

    python benchmarks/seeded_collapse.py --corpus my-texts --out collapse [--seeds 0 1 2] [--before 160 --after 160]
"""

import argparse
import copy
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moesaic.cli import output
from moesaic.cli.text_source import Text, add_corpus_argument, gather_text
from moesaic.models.build import build
from moesaic.models.decoder import Decoder
from moesaic.telemetry.load import StepLoad, sum_loads
from moesaic.telemetry.probe import probe, routed_layers
from moesaic.telemetry.states import states_of
from moesaic.train.doctor.split import constant_row
from moesaic.train.doctor.surgery import Theatre
from moesaic.train.loop import Trainer
from moesaic.train.optimizer import named_state
from moesaic.train.recipe import Recipe
from moesaic.train.snapshot import copied

WINDOW = 20  # steps whose loads are judged together
TAKEN = 60.0  # the logit of the expert that takes over: so far that no gradient is left in fp32, not even for Adam

RECIPE: dict[str, Any] = {
    "vocab_size": 1024,
    "model": {
        "model_type": "moesaic",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "router": "softmax_topk",
    },
    "train": {
        "batch_size": 8,
        "sequence_length": 64,
        "learning_rate": 3e-3,
        "schedule": "wsd",
        "decay_fraction": 0.2,
        "evaluate_tokens": 2048,
    },
    "data": {"weights": "uniform"},
}

Illness = Callable[[Trainer], None]


def takeover(trainer: Trainer) -> None:
    """Expert 0's row becomes the direction that all tokens have in common, scaled until it wins them all."""
    for layer, probed in _probes(trainer).items():
        theatre = Theatre(trainer.model, trainer.optimizer, layer)
        weight = theatre.router_weight("weight")
        assert weight is not None
        theatre.write(weight, 0, TAKEN * constant_row(probed.x_TD))


def killed(trainer: Trainer) -> None:
    """Every fourth expert."""
    for layer, probed in _probes(trainer).items():
        theatre = Theatre(trainer.model, trainer.optimizer, layer)
        weight = theatre.router_weight("weight")
        assert weight is not None
        for expert in range(0, len(weight.master), 4):
            theatre.write(weight, expert, -TAKEN * constant_row(probed.x_TD))
            for part in theatre.expert_weights:
                theatre.write(part, expert, torch.zeros_like(part.master[expert]))


def identical(trainer: Trainer) -> None:
    """Expert 1 becomes expert 0."""
    for layer in routed_layers(trainer.model):
        _copy(Theatre(trainer.model, trainer.optimizer, layer), 0, 1)


def doubled(trainer: Trainer) -> None:
    """Experts 1, 3, ... become experts 0, 2, ..."""
    for layer, module in routed_layers(trainer.model).items():
        theatre = Theatre(trainer.model, trainer.optimizer, layer)
        for expert in range(0, module.router.config.num_experts - 1, 2):
            _copy(theatre, expert, expert + 1)


def _copy(theatre: Theatre, source: int, target: int) -> None:
    """Weights and router row; moments, too, so that both take the same steps."""
    weight = theatre.router_weight("weight")
    assert weight is not None
    for part in (*theatre.expert_weights, weight):
        for row in (target, source):  # first moments begin anew in both
            theatre.write(part, row, part.master[source], state_of=source)


ILLNESSES: dict[str, Illness] = {
    "healthy": lambda trainer: None,
    "takeover": takeover,
    "killed": killed,
    "identical": identical,
    "doubled": doubled,
}


def _probes(trainer: Trainer):
    assert isinstance(trainer.model, Decoder)
    return probe(trainer.model, torch.from_numpy(trainer.batches.batch(0).inputs_BS))


class Ill(NamedTuple):
    """Over all layers: experts that no token reaches or that have no weights, that do the work of several, and pairs
    that answer the same."""

    dead: int
    oversized: int
    twins: int


def ill(window: list[StepLoad], trainer: Trainer) -> Ill:
    """What is ill now, by the loads of the last steps."""
    judged = [(load, state) for load in sum_loads(window).layers for state in states_of(load)]
    twins = sum(len(probed.duplicates()) for probed in _probes(trainer).values())
    dead = {(layer.layer, state.expert) for layer, state in judged if state.state == "dead"}
    dead |= {(layer, expert) for layer in routed_layers(trainer.model) for expert in _mute(trainer, layer)}
    return Ill(len(dead), sum(state.state == "oversized" for _, state in judged), twins)


def _mute(trainer: Trainer, layer: int) -> list[int]:
    weights = [part.master for part in Theatre(trainer.model, trainer.optimizer, layer).expert_weights]
    return [expert for expert in range(len(weights[0])) if not all(bool(part[expert].any()) for part in weights)]


def go_on(moment: dict[str, Any], recipe: Recipe, text: Text, illness: str, doctor: str, steps: int) -> dict[str, Any]:
    """One continuation: seed the illness, train, and read the end."""
    settings = dataclasses.replace(recipe.train, doctor=doctor)
    trainer = Trainer(copied(moment["model"], "cpu"), settings, text.packed, data=recipe.data)
    for name, tensor in named_state(trainer.model, trainer.optimizer):
        tensor.copy_(moment["state"][name])
    trainer.step = moment["step"]
    ILLNESSES[illness](trainer)
    lines: list[dict[str, Any]] = []
    if trainer.doctor is not None:
        trainer.doctor.say = lines.append
    started, window, clear_since = time.perf_counter(), [], None
    begun = trainer.evaluate().loss.bits_per_byte
    for done in range(1, steps + 1):
        report = trainer.train_step()
        if trainer.doctor is not None:
            trainer.doctor.after_step(trainer.step, report.load)
        window = [*window, report.load][-WINDOW:]
        if done % WINDOW == 0:
            is_clear = not any(ill(window, trainer))
            clear_since = (clear_since or done) if is_clear else None
    end = ill(window, trainer)
    return {
        "illness": illness,
        "doctor": doctor,
        "begun": begun,
        "bits_per_byte": trainer.evaluate(2 * settings.evaluate_tokens).loss.bits_per_byte,
        **end._asdict(),
        "clear_since": clear_since,
        "treated": sum(line["doctor"] == "treated" for line in lines),
        "undone": sum(line["doctor"] == "undone" for line in lines),
        "log": lines,
        "seconds": time.perf_counter() - started,
    }


def trained(recipe: Recipe, text: Text, before: int) -> dict[str, Any]:
    """The moment from which all continuations of a seed start."""
    config = recipe.model_config(text.tokenizer.vocab_size, text.packed.eos_id)
    trainer = Trainer(build(config).initialize(recipe.train.seed), recipe.train, text.packed, data=recipe.data)
    for _ in range(before):
        trainer.train_step()
    state = {name: tensor.clone() for name, tensor in named_state(trainer.model, trainer.optimizer)}
    return {"model": trainer.model, "state": state, "step": trainer.step}


def recipe_of(seed: int, before: int, after: int) -> Recipe:
    """The study's recipe."""
    tree = copy.deepcopy(RECIPE)
    tree["train"] |= {"steps": before + after, "seed": seed}
    return Recipe.from_dict(tree)


def table(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each illness with and without the doctor: medians over seeds, and their range."""
    healthy = [result["bits_per_byte"] for result in results if _is(result, "healthy", "off")]
    rows = []
    for illness in ILLNESSES:
        for doctor in ("off", "act"):
            found = [result for result in results if _is(result, illness, doctor)]
            if not found:
                continue
            losses = [result["bits_per_byte"] for result in found]
            # Seeds differ among themselves: what the illness costs is read seed by seed.
            own = {result["seed"]: result["bits_per_byte"] for result in results if _is(result, "healthy", "off")}
            costs = [result["bits_per_byte"] - own[result["seed"]] for result in found if result["seed"] in own]
            clear = [result["clear_since"] for result in found]
            rows.append(
                (
                    illness,
                    doctor,
                    _spread([result["begun"] for result in found], ".3f"),
                    _spread(losses, ".3f"),
                    _spread(costs, "+.3f"),
                    *(_spread([result[name] for result in found], ".0f") for name in Ill._fields),
                    "never" if None in clear else f"{max(clear)}",
                    _spread([result["treated"] for result in found], ".0f"),
                    _spread([result["undone"] for result in found], ".0f"),
                )
            )
    noise = max(healthy) - min(healthy) if len(healthy) > 1 else math.nan
    output.talk(f"range of the healthy seeds: {noise:.3f} bits per byte")
    return rows


def _is(result: dict[str, Any], illness: str, doctor: str) -> bool:
    return result["illness"] == illness and result["doctor"] == doctor


def _spread(values: list[float], form: str) -> str:
    if not values:
        return "-"
    low, high = format(min(values), form), format(max(values), form)
    middle = format(statistics.median(values), form)
    return middle if low == high else f"{middle} ({low} to {high})"


COLUMNS = (
    *("illness", "doctor", "bits/byte at once", "at the end", "over healthy", *Ill._fields),
    *("clear after", "treated", "undone"),
)


def main() -> None:
    """Train, seed, go on, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpus_argument(parser)
    parser.add_argument("--out", type=Path, required=True, help="where results and the tokenizer are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--illnesses", nargs="+", choices=list(ILLNESSES), default=list(ILLNESSES))
    parser.add_argument("--before", type=int, default=160, help="steps before the illness")
    parser.add_argument("--after", type=int, default=160, help="steps after it")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    text = gather_text(args.corpus, RECIPE["vocab_size"], args.out / "tokenizer")
    place = args.out / "results.jsonl"
    results = [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []
    done = {(result["seed"], result["illness"], result["doctor"]) for result in results}
    with place.open("a", buffering=1) as file:
        for seed in args.seeds:
            recipe = recipe_of(seed, args.before, args.after)
            missing = [(i, d) for i in args.illnesses for d in ("off", "act") if (seed, i, d) not in done]
            moment = trained(recipe, text, args.before) if missing else {}
            for illness, doctor in missing:
                result = {"seed": seed, **go_on(moment, recipe, text, illness, doctor, args.after)}
                results.append(result)
                file.write(json.dumps(result) + "\n")
                output.talk(
                    f"seed {seed} {illness} doctor={doctor}: {result['bits_per_byte']:.3f} bits per byte, "
                    f"{result['dead']} dead, {result['oversized']} oversized, {result['twins']} twins, "
                    f"{result['treated']} treated, "
                    f"{result['seconds']:.0f} s"
                )
    output.table(COLUMNS, table(results), f"{args.before} steps, then {args.after} more; seeds {args.seeds}")


if __name__ == "__main__":
    main()
