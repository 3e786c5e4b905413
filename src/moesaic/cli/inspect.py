"""`moesaic inspect`: what a model's experts are for, as a page to look at or as JSON."""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli import output
from moesaic.cli.inspect_source import SEQUENCE_LENGTH, TRACE_SUFFIX, Asked, Seen, asked_for, saturation, see
from moesaic.errors import ConfigError

if TYPE_CHECKING:
    from moesaic.telemetry.inspection.findings import LayerFindings
    from moesaic.telemetry.inspection.inspection import Inspection, Subject

MAX_TOKENS = 4096
PAGE = Path("inspect.html")

EXAMPLES = """\
example: moesaic inspect runs/first  # a run: its model, and how its routers came there
example: moesaic inspect model --data my-texts --out model.html
example: moesaic inspect model --data book.txt --against other-model
example: moesaic inspect routing.npz --tokenizer model  # what `moesaic trace` recorded"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic inspect`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint folder, a run folder, a .gguf file, a preset; or a trace (.npz)"
    )
    parser.add_argument(
        "--data",
        metavar="TEXT",
        type=Path,
        help="text to read: a file, a folder with a subfolder a domain, or what `moesaic pack` made, of which the "
        "held-out part (default: what a run was trained on, else the embedded corpus)",
    )
    parser.add_argument("--against", metavar="OTHER", help="a second model or trace, to stand side by side")
    parser.add_argument("--tokenizer", metavar="FOLDER", type=Path, help="of a trace's text, to spell its tokens")
    parser.add_argument("--out", metavar="FILE", type=Path, help=f"where the page goes ({PAGE})")
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=MAX_TOKENS, help="read at most N tokens a domain (%(default)s)"
    )
    parser.add_argument(
        "--sequence-length",
        metavar="N",
        type=int,
        help=f"tokens of a window ({SEQUENCE_LENGTH}, or the model's context where that is shorter)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document with every number; a page only with --out"
    )


def run(args: argparse.Namespace) -> int:
    """Inspect one model or trace, or two. Returns the exit code."""
    _check(args)
    with tempfile.TemporaryDirectory(prefix="moesaic-inspect-") as scratch:
        inspection = _inspect(args, Path(scratch))
    page = args.out or (None if args.json else PAGE)
    if page is not None:
        from moesaic.telemetry.inspection.page import write_page

        write_page(inspection, page, _facts(args))
    if args.json:
        output.print_json(inspection.to_json())
    else:
        _print(inspection)
    if page is not None:
        output.talk(f"page: {page.resolve()} (open it in a browser; it asks nothing of the network)")
    if not args.against:
        output.next_command(f"moesaic inspect {args.model} --against OTHER")
    return 0


def _check(args: argparse.Namespace) -> None:
    traces = [name.endswith(TRACE_SUFFIX) for name in (args.model, args.against) if name]
    if any(traces) and not all(traces):
        raise ConfigError(
            "a trace beside a checkpoint; record the checkpoint over the same text with `moesaic trace` and give both "
            "traces"
        )
    if traces[0] and args.data:
        raise ConfigError(f"{args.model} is a recording and has its text; leave out --data")
    if args.tokenizer and not traces[0]:
        raise ConfigError("--tokenizer is for traces; a checkpoint brings its own")
    for name, value in (("--max-tokens", args.max_tokens), ("--sequence-length", args.sequence_length)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}; give 1 or more")
    if args.out is not None and args.out.is_dir():
        raise ConfigError(f"--out {args.out} is a folder; name a file for the page, such as {args.out / PAGE}")


def _inspect(args: argparse.Namespace, scratch: Path) -> "Inspection":
    from moesaic.telemetry.inspection.inspection import Inspection, agree, why_not_comparable

    asked = [asked_for(name) for name in (args.model, args.against) if name]
    seen = [see(each, args, scratch) for each in asked]
    subjects = _told_apart([_subject(each, one) for each, one in zip(asked, seen, strict=True)])
    agreement, why_not = None, ""
    if len(seen) > 1:
        why_not = why_not_comparable(seen[1].trace, seen[0].trace) or ""
        agreement = None if why_not else agree([subjects[1].name], [seen[1].trace], seen[0].trace)
    way = None if asked[0].run is None else saturation(asked[0].run, seen[0], scratch)
    return Inspection(subjects=subjects, agreement=agreement, why_not=why_not, saturation=way)


def _subject(asked: Asked, seen: Seen) -> "Subject":
    from moesaic.telemetry.inspection.inspection import subject_of

    with output.progress(f"measuring {asked.name}", len(seen.trace.layers)) as advance:
        return subject_of(
            asked.name, asked.path, seen.trace, seen.texts, told=lambda layer: advance(1, f"{layer + 1} layers")
        )


def _told_apart(subjects: "list[Subject]") -> "list[Subject]":
    """Two of the same name get their places as names."""
    if len({subject.name for subject in subjects}) == len(subjects):
        return subjects
    return [dataclasses.replace(subject, name=subject.source) for subject in subjects]


def _facts(args: argparse.Namespace) -> list[tuple[str, str]]:
    named = {"model": args.model, "against": args.against, "text": args.data, "tokens a domain": args.max_tokens}
    return [(name, str(value)) for name, value in named.items() if value]


def _print(inspection: "Inspection") -> None:
    from moesaic.telemetry.inspection.sentences import verdicts

    columns = ("layer", "experts", "max/mean", "effective", "dead", "domains, bits", "chance", "token, bits", "chance")
    for subject in inspection.subjects:
        found = subject.findings
        rows = [_row(layer) for layer in found.layers]
        output.table(columns, rows, f"{subject.name} ({found.family}), {found.num_tokens} tokens")
    output.write("\n".join(f"- {verdict.text}" for verdict in verdicts(inspection)) + "\n")


def _row(layer: "LayerFindings") -> list[str]:
    token = layer.information.get("token") or (None, None)
    return [
        str(layer.layer),
        f"{layer.top_k} of {layer.num_experts}",
        _cell(None if layer.max_violation is None else layer.max_violation + 1, ".2f"),
        _cell(layer.effective_experts, ".1f"),
        str(layer.states.count("dead")),
        *(_cell(value, ".3f") for value in layer.divergence or (None, None)),
        *(_cell(value, ".2f") for value in token),
    ]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
