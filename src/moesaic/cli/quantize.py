"""`moesaic quantize`: rounds a checkpoint's weights to 8 or 4 bits, file to file, and says what that cost."""

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli import output
from moesaic.cli.convert import Thousandths, check_target
from moesaic.errors import ConfigError

if TYPE_CHECKING:  # at run time torch comes in only once the options make sense
    from moesaic.data.packed import Packed

BITS, HEAD_BITS, GROUPS = (8, 4), (16, 8, 4), (32, 64, 128)
MAX_TOKENS = 16_384
SEQUENCE_LENGTH = 512
EMBEDDED = "embedded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic quantize`."""
    parser.epilog = "example: moesaic quantize runs/demo/moe --bits 8 --experts-bits 4 --data"
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a .gguf file")
    parser.add_argument("--bits", type=int, choices=BITS, required=True, help="of the matrices")
    parser.add_argument("--experts-bits", type=int, choices=BITS, help="those of routed experts (as --bits)")
    parser.add_argument(
        "--head-bits", type=int, choices=HEAD_BITS, help="those of the head; 16 keeps it (8; of uneven values 16)"
    )
    parser.add_argument(
        "--values",
        choices=("even", "uneven"),
        default="even",
        help="what 4 bits stand for: even steps, which other programs read, too, or uneven ones, which lose less "
        "(%(default)s)",
    )
    parser.add_argument(
        "--group", type=int, choices=GROUPS, default=32, help="weights that share a scale (%(default)s)"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where it goes (NAME-4bit in the current folder)")
    parser.add_argument(
        "--data",
        metavar="CORPUS",
        nargs="?",
        const=EMBEDDED,
        help="judge the model before and after on the held-out part of this text (the embedded corpus if not given); "
        "both are loaded for that, in fp32",
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=MAX_TOKENS, help="judge by N tokens a domain (%(default)s)"
    )
    parser.add_argument(
        "--sequence-length",
        metavar="N",
        type=int,
        help=f"tokens of a window to judge by ({SEQUENCE_LENGTH}, or the model's context where that is shorter)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what FOLDER holds")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Round, write, report. Returns the exit code."""
    from moesaic.hub.resolve import locate

    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens {args.max_tokens}; give 1 or more")
    locate(args.model)  # a mistyped name is answered before seconds go into importing torch
    importlib.import_module("moesaic.tune.upcycle")  # makes known the preset whose weights it makes
    from moesaic.quantize.files import default_folder

    folder = args.out or default_folder(args.model, args.bits)
    check_target(Path(args.model), folder, args.overwrite, "--out FOLDER")
    text = None if args.data is None else _text(args)
    document = _quantize(args, folder)
    if text is not None:
        document["held_out"] = {
            "before": _held_out(args.model, text, args),
            "after": _held_out(str(folder), text, args),
        }
    if args.json:
        output.print_json(document)
    else:
        _print(document)
    # Beside uneven values the head stays in the files, and is rounded as they are opened.
    opened = " --bits 4 --values uneven" if args.values == "uneven" else ""
    output.next_command(f'moesaic generate {folder}{opened} --prompt "Once upon a time"')
    return 0


def _quantize(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from moesaic import hub
    from moesaic.data.open_tokenizer import open_tokenizer
    from moesaic.hub.resolve import weights_place
    from moesaic.quantize.files import quantize_checkpoint
    from moesaic.quantize.report import report

    place = weights_place(args.model)
    with output.progress(f"rounding to {folder}", total=1000) as advance:
        quantized = quantize_checkpoint(
            args.model,
            folder,
            args.bits,
            experts_bits=args.experts_bits,
            head_bits=args.head_bits,
            group=args.group,
            values=args.values,
            tokenizer=None if place.kind == "folder" else open_tokenizer(args.model),
            advance=Thousandths(advance).add,
        )
    settings = {
        "folder": str(folder),
        "bits": args.bits,
        "experts_bits": args.experts_bits or args.bits,
        "head_bits": args.head_bits or (16 if args.values == "uneven" else 8),
        "group": args.group,
        "values": args.values,
    }
    return settings | report(quantized, hub.read_config(folder).total) | {"held_out": None}


def _text(args: argparse.Namespace) -> "Packed":
    """The text to judge by, in the model's own tokens; what cannot be judged is said before the work."""
    from moesaic import hub
    from moesaic.cli.text_source import gather_text
    from moesaic.hub.resolve import weights_place

    config = hub.read_config(args.model)
    config.check_decoder_only("--data")
    if not 1 <= (args.sequence_length or 1) <= config.context_length:
        raise ConfigError(
            f"--sequence-length {args.sequence_length}; this model takes 1 to {config.context_length} tokens"
        )
    place = weights_place(args.model)
    if place.kind != "folder":
        raise ConfigError(
            f"{args.model} is no folder, and text is packed with a folder's tokenizer.json; make one with "
            f"`moesaic convert {args.model} OUT_FOLDER`"
        )
    packed: Any = gather_text(None if args.data == EMBEDDED else Path(args.data), 0, place.path).packed
    return packed


def _held_out(model: str, text: "Packed", args: argparse.Namespace) -> dict[str, Any]:
    """Every document by itself: a token sees none of the one before."""
    import torch

    from moesaic import hub
    from moesaic.evaluate.perplexity import held_out_loss
    from moesaic.models.build import decoder_only

    with output.progress(f"judging {model}"):
        decoder = decoder_only(hub.load(model, dtype=torch.float32), "--data")
        length = args.sequence_length or min(SEQUENCE_LENGTH, decoder.config.context_length)
        loss = held_out_loss(decoder, text, sequence_length=length, max_tokens=args.max_tokens, document_attention=True)
    return {"bits_per_byte": loss.bits_per_byte, "by_domain": loss.by_domain}


def _print(document: dict[str, Any]) -> None:
    rows = [
        (
            each["layer"] or "-",
            each["role"],
            str(each["bits"]),
            output.number(each["weights"]),
            f"{each['error']:.2%}",
            f"{each['worst_error']:.2%}",
        )
        for each in document["by_layer"]
    ]
    output.table(("layer", "role", "bits", "weights", "error", "worst tensor"), rows, _title(document))
    for each in document["worst_tensors"]:
        output.talk(f"{each['error']:.2%} in {each['bits']} bits: {each['name']}")
    for each in document["worst_experts"]:
        output.talk(f"{each['error']:.2%}: expert {each['expert']} of layer {each['layer']}")
    if document["held_out"]:
        before, after = (document["held_out"][when]["bits_per_byte"] for when in ("before", "after"))
        output.talk(f"held-out bits a byte: {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%})")


def _title(document: dict[str, Any]) -> str:
    bits = document["bits_per_weight"]
    experts = "" if bits["experts"] is None else f", experts {bits['experts']:.2f}"
    return (
        f"{document['folder']}: {output.size(document['bytes_before'])} before, "
        f"{output.size(document['bytes_after'])} after; {bits['all']:.2f} bits a weight{experts}; "
        f"error {document['error']:.2%} of the weights' norm"
    )
