"""What rounding costs a trained model on held-out text, against llama.cpp's formats of the same weights at equal bits.

Rounded are the matrices of attention, dense blocks and experts; embeddings, head, norms and routers stay as the files
have them. "engine" is what `moesaic.Engine` computes: its rows are in 8 bits, too, and its head has few. Of an MoE also
each expert's error, experts that are rarely chosen apart, and the loss of tokens that go to these.

    python benchmarks/equal_bits.py runs/first/model --corpus my-texts --ggml llama.cpp/build/bin/libggml-base.so
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from expert_errors import Served, expert_errors, expert_layers, loads, quarters, rare_choices, serve
from rounded_model import formats, round_all
from token_losses import Estimate, Losses, engine_losses, held_out, model_losses
from torch import Tensor

from moesaic import Engine, hub
from moesaic.cli import output
from moesaic.cli.text_source import gather_text
from moesaic.data.held_out import HeldOutBatch
from moesaic.data.packed import Packed
from moesaic.kernels.rounding import Bits, Values
from moesaic.models.build import decoder_only
from moesaic.models.decoder import Decoder

ENGINES: tuple[tuple[Bits, Values], ...] = ((8, "even"), (4, "even"), (4, "uneven"))
SERVED_TOKENS = 512  # of each domain, on which experts' outputs are compared

Row = dict[str, Any]


class Routing(NamedTuple):
    """How the unrounded model routes. rare_N: of each scored token, how many choices are of the rarest quarter."""

    served: dict[str, list[Served]]
    loads_LE: Tensor
    rare_N: Tensor


def routing_of(model: Decoder, text: Packed, batches: list[HeldOutBatch], length: int) -> Routing:
    """Runs the model over the text twice."""
    served = serve(model, held_out(text, length, SERVED_TOKENS))
    return Routing(served, loads(served), rare_choices(model, batches, quarters(loads(served))[0]))


def expert_row(model: Decoder, exact: dict[str, Tensor], routing: Routing, more_N: Tensor) -> Row:
    """What the second table says of the model as it is rounded now. more_N: the loss above the unrounded model's."""
    errors, (rare_LE, busy_LE) = expert_errors(model, exact, routing.served), quarters(routing.loads_LE)
    many = routing.rare_N.float().quantile(0.75).clamp_min(1)
    tokens = {"no": routing.rare_N == 0, "any": routing.rare_N > 0, "most": routing.rare_N >= many}
    row: Row = {}
    for what, errors_LE in errors._asdict().items():
        row[what] = {"rare": errors_LE[rare_LE].nanmean().item(), "busy": errors_LE[busy_LE].nanmean().item()}
    for which, chosen_N in tokens.items():
        more = more_N[chosen_N]
        spread = more.std().item() / math.sqrt(max(1, len(more)))
        row[which] = {"share": len(more) / len(more_N), "more": Estimate(more.mean().item(), spread)._asdict()}
    return row


def measure(path: str, text: Packed, ggml: Path, max_tokens: int, length: int) -> list[Row]:
    """A row for each format and engine, the unrounded model first."""
    compared = formats(ggml)
    model = decoder_only(hub.load(path, dtype=torch.float32), "this").eval()
    exact = {name: value.detach().clone() for name, value in model.state_dict().items()}
    batches = held_out(text, length, max_tokens)
    before = model_losses(model, batches)
    rows = [loss_row("as the files have it", 16.0, before, None, None)]
    output.talk(f"{len(before.nats_N)} tokens, {before.bits_per_byte:.4f} bits a byte before")
    routing = routing_of(model, text, batches, length) if expert_layers(model) else None
    ours: dict[float, Losses] = {}
    for format in compared:
        error = round_all(model, exact, format)
        after = model_losses(model, batches)
        row = loss_row(format.name, format.bits, after, before, ours.get(format.bits)) | {"weight_error": error}
        if routing is not None:
            row["experts"] = expert_row(model, exact, routing, after.nats_N - before.nats_N)
        ours.setdefault(format.bits, after)
        rows.append(row)
        output.talk("  ".join(cells(row) + (expert_cells(row)[1:] if routing else [])))
    for bits, values in ENGINES:
        after = engine_losses(Engine(path, bits=bits, values=values), batches)
        rows.append(loss_row(f"engine, {bits} bits, {values}", bits + 0.5, after, before, ours[bits + 0.5]))
        output.talk("  ".join(cells(rows[-1])))
    return rows


def loss_row(name: str, bits: float, after: Losses, before: Losses | None, ours: Losses | None) -> Row:
    """ours: of moesaic's rounding at equal bits."""
    return {
        "format": name,
        "bits_per_weight": bits,
        "weight_error": None,
        "bits_per_byte": after.bits_per_byte,
        "perplexity": after.perplexity,
        "more": None if before is None else after.more_than(before)._asdict(),
        "more_than_ours": None if ours is None else after.more_than(ours)._asdict(),
    }


LOSS_COLUMNS = ("format", "bits a weight", "error", "bits a byte", "perplexity", "more", "more than ours")
EXPERT_COLUMNS = (
    *("format", "weights, rare", "weights, busy", "outputs, rare", "outputs, busy"),
    *("nats more, no rare choice", "any", "most"),
)


def cells(row: Row) -> list[str]:
    """A line of the first table."""
    error = "-" if row["weight_error"] is None else f"{row['weight_error']:.2%}"
    numbers = f"{row['bits_per_weight']:g}", error, f"{row['bits_per_byte']:.4f}", f"{row['perplexity']:.3f}"
    return [row["format"], *numbers, plus_minus(row["more"]), plus_minus(row["more_than_ours"])]


def expert_cells(row: Row) -> list[str]:
    """A line of the second table."""
    errors = [
        f"{row['experts'][what][which]:.2%}" for what in ("weights_LE", "outputs_LE") for which in ("rare", "busy")
    ]
    return [row["format"], *errors, *(plus_minus(row["experts"][which]["more"]) for which in ("no", "any", "most"))]


def plus_minus(estimate: dict[str, float] | None) -> str:
    return "-" if estimate is None else f"{estimate['mean']:+.5f} ± {estimate['error']:.5f}"


def main() -> None:
    """Measure a model, and print what each format costs it and its experts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ggml", type=Path, required=True, metavar="LIBRARY", help="libggml-base of llama.cpp")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--max-tokens", type=int, default=8192, help="a domain")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="print the results as one JSON document")
    args = parser.parse_args()
    text = cast(Packed, gather_text(args.corpus, 0, Path(args.model)).packed)
    rows = measure(args.model, text, args.ggml, args.max_tokens, args.sequence_length)
    if args.json:
        return output.print_json({"model": args.model, "rows": rows})
    output.table(LOSS_COLUMNS, [cells(row) for row in rows])
    if of_experts := [row for row in rows if "experts" in row]:
        shares = ", ".join(f"{which} {of_experts[0]['experts'][which]['share']:.0%}" for which in ("no", "any", "most"))
        output.table(EXPERT_COLUMNS, [expert_cells(row) for row in of_experts], title=f"tokens: {shares}")


if __name__ == "__main__":
    main()
