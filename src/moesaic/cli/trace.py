"""`moesaic trace`: records which expert serves which token of a text, and shows what a recording holds."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moesaic.cli import output
from moesaic.errors import ConfigError, DataError
from moesaic.telemetry.health import dead_experts, domain_divergence, load_entropy
from moesaic.trace import Fingerprint, LayerFingerprint, Trace, TraceWriter

if TYPE_CHECKING:  # what shows a trace needs no torch
    from moesaic.cli.text import Opened
    from moesaic.config import ModelConfig
    from moesaic.data.packed import Packed
    from moesaic.models.decoder import Decoder

SUFFIX = ".npz"
MAX_TOKENS = 16_384
SEQUENCE_LENGTH = 512
BATCH_TOKENS = 4096
DTYPES = ["fp32", "bf16"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic trace`."""
    parser.epilog = "example: moesaic trace runs/demo/moe --out routing.npz\nexample: moesaic trace routing.npz"
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint folder or a .gguf file to record; or a trace (.npz) to show"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="record to this file, whose name ends in .npz")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", type=Path, help="a UTF-8 file to read")
    source.add_argument(
        "--corpus",
        metavar="FOLDER",
        type=Path,
        help="read the held-out part of this text, as `moesaic train` takes it (default: the embedded corpus)",
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=MAX_TOKENS, help="read at most N tokens a domain (%(default)s)"
    )
    parser.add_argument(
        "--sequence-length",
        metavar="N",
        type=int,
        help=f"tokens of a window ({SEQUENCE_LENGTH}, or the model's context where that is shorter)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="compute in this format (the checkpoint's if not given)")
    parser.add_argument("--json", action="store_true", help="print one JSON document, with the counts of every expert")


def run(args: argparse.Namespace) -> int:
    """Record a trace, or verify one; print what it holds. Returns the exit code."""
    _check(args)
    if args.out is not None:
        _record(args)
    path = args.out or Path(args.model)
    document = describe(Trace.open(path).require_tokens())
    if args.json:
        output.print_json(document)
    else:
        _print(document)
    if args.out is not None:
        output.next_command(f"moesaic trace {path} --json")
    return 0


def describe(trace: Trace) -> dict[str, Any]:
    """What a trace with tokens holds, JSON-ready. Shares are of 1; what needs rows is None without any."""
    return {
        "trace": str(trace.path),
        "bytes": trace.path.stat().st_size,
        "family": trace.fingerprint.family,
        "forwards": len(trace),
        "tokens": trace.num_tokens,
        "routed_tokens": trace.num_routed_tokens,
        "domains": list(trace.domains),
        "layers": [_describe_layer(trace, layer) for layer in trace.fingerprint.layers],
    }


def _describe_layer(trace: Trace, layer: LayerFingerprint) -> dict[str, Any]:
    """dropped: the share of the chosen rows that a capacity took. share_of_tokens: of those at the heaviest expert."""
    counts_E, num_tokens = trace.counts(layer.layer), trace.num_routed_tokens
    num_rows, num_chosen = int(counts_E.sum()), trace.chosen(layer.layer).num_rows
    by_domain = trace.domain_counts(layer.layer) if "domain_ids" in trace.token_facts else None
    dead = dead_experts(counts_E, num_tokens=num_tokens, top_k=layer.top_k)
    return {
        **layer._asdict(),
        "rows": num_rows,
        "rows_per_token": num_rows / num_tokens,
        "max_over_mean": float(counts_E.max() / counts_E.mean()) if num_rows else None,
        "load_entropy": _or_none(load_entropy(counts_E)),
        "heaviest": int(counts_E.argmax()),
        "share_of_tokens": float(counts_E.max() / num_tokens),
        "dead": None if dead is None else list(dead),
        "dropped": 1 - num_rows / num_chosen if num_chosen else None,
        "domain_divergence": None if by_domain is None else _or_none(domain_divergence(by_domain)),
        "counts": counts_E.tolist(),
        "domain_counts": None if by_domain is None else by_domain.tolist(),
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _check(args: argparse.Namespace) -> None:
    if args.out is None and (args.text or args.corpus or not args.model.endswith(SUFFIX)):
        raise ConfigError(
            f"no --out; `moesaic trace MODEL --out FILE{SUFFIX}` records, and `moesaic trace FILE{SUFFIX}` shows a "
            "recording"
        )
    if args.out is not None and args.out.suffix != SUFFIX:
        raise ConfigError(f"--out {args.out}; give a name that ends in {SUFFIX}")
    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens {args.max_tokens}; give 1 or more")


def _print(document: dict[str, Any]) -> None:
    padding = document["tokens"] - document["routed_tokens"]
    title = (
        f"{document['trace']} ({document['family']}): {document['forwards']} forwards, {document['tokens']} tokens"
        + (f" ({padding} of them padding)" if padding else "")
        + (f", {len(document['domains'])} domains" if document["domains"] else "")
        + f", {output.size(document['bytes'])}, checksum holds"
    )
    columns = ("layer", "experts", "a token", "max/mean", "entropy", "heaviest", "its tokens", "dead", "dropped")
    output.table((*columns, "domains differ"), [_row(layer) for layer in document["layers"]], title)


def _row(layer: dict[str, Any]) -> list[str]:
    def cell(name: str, form: str) -> str:
        return "-" if layer[name] is None else format(layer[name], form)

    return [
        str(layer["layer"]),
        str(layer["num_experts"]),
        cell("rows_per_token", ".2f"),
        cell("max_over_mean", ".2f"),
        cell("load_entropy", ".3f"),
        str(layer["heaviest"]) if layer["rows"] else "-",
        cell("share_of_tokens", ".1%"),
        "-" if layer["dead"] is None else str(len(layer["dead"])),
        cell("dropped", ".1%"),
        cell("domain_divergence", ".3f"),
    ]


class Batch(NamedTuple):
    """Windows of text, B x S. mask_BS: false for padding; None without any."""

    token_ids_BS: np.ndarray
    mask_BS: np.ndarray | None = None
    domain: int | None = None


class Batches(NamedTuple):
    """What is read. num_tokens is an upper bound, for the progress bar."""

    num_tokens: int
    domains: tuple[str, ...]
    batches: Iterator[Batch]


def _record(args: argparse.Namespace) -> None:
    from moesaic import hub
    from moesaic.cli.text import open_model
    from moesaic.models.build import decoder_only

    config = hub.read_config(args.model)
    config.check_decoder_only("trace")
    fingerprint = Fingerprint.of(config)  # a model without experts is refused before its weights are read
    length = window_length(args.sequence_length, config)
    text = args.text.read_bytes() if args.text else b""
    opened = open_model(args.model, args.dtype)
    if args.text:
        found = read_text(opened, text, args.text, args.max_tokens, length)
    else:
        found = read_corpus(args.model, args.corpus, args.max_tokens, length)
    found = known(found, config.vocab_size)
    with (
        TraceWriter(args.out, fingerprint, domains=found.domains) as writer,
        output.progress("tracing", found.num_tokens) as advance,
    ):
        for num_tokens in _trace(decoder_only(opened.model, "trace"), found.batches, writer):
            advance(num_tokens, f"{writer.num_tokens} tokens")


def window_length(asked: int | None, config: "ModelConfig") -> int:
    """How many tokens a window has. Raises ConfigError for more than the model takes."""
    length = asked or min(SEQUENCE_LENGTH, config.context_length)
    if not 1 <= length <= config.context_length:
        raise ConfigError(f"--sequence-length {length}; this model takes 1 to {config.context_length} tokens")
    return length


def _trace(model: "Decoder", batches: Iterator[Batch], writer: TraceWriter) -> Iterator[int]:
    """Run the model over each batch, as in evaluation: dropless. Yields the tokens of each batch when it is written."""
    import torch

    from moesaic.routing.taping import TraceTape

    tape, device = TraceTape(writer), model.embedding.weight.device
    model.eval()
    with torch.no_grad():
        for batch in batches:
            tape.set_domains(batch.domain)
            mask_BS = None if batch.mask_BS is None else torch.from_numpy(batch.mask_BS).to(device)
            model.hidden(torch.from_numpy(batch.token_ids_BS).to(device), mask_BS, tape=tape)
            yield batch.token_ids_BS.size


def read_text(opened: "Opened", text: bytes, place: Path, max_tokens: int, length: int) -> Batches:
    """A file's text in windows, by the model's own tokenizer. Raises DataError for one without any."""
    from moesaic.cli.text import decode_utf8

    ids = np.array(opened.tokenizer.encode(decode_utf8(text, str(place)), add_special_tokens=True), np.int64)
    ids = ids[:max_tokens]
    if not ids.size:
        raise DataError(f"{place} holds no text; give a file with at least one token")
    return Batches(len(ids), (), _windows(ids, length))


def known(found: Batches, vocab_size: int) -> Batches:
    """The same, but it raises DataError at the first tokens that a model of this vocabulary does not know."""

    def checked() -> Iterator[Batch]:
        for batch in found.batches:
            highest = int(batch.token_ids_BS.max())
            if highest >= vocab_size:
                raise DataError(
                    f"token id {highest} in the text, and the model knows 0 to {vocab_size - 1}; the tokenizer.json "
                    "beside its weights is another model's: put its own there"
                )
            yield batch

    return found._replace(batches=checked())


def _windows(ids: np.ndarray, length: int) -> Iterator[Batch]:
    """All of the text in windows; the last one, when it is shorter, by itself."""
    whole = len(ids) // length * length
    windows = ids[:whole].reshape(-1, length)
    rows = max(1, BATCH_TOKENS // length)
    for first in range(0, len(windows), rows):
        yield Batch(windows[first : first + rows])
    if whole < len(ids):
        yield Batch(ids[None, whole:])


def read_corpus(model: str, corpus: Path | None, max_tokens: int, length: int) -> Batches:
    """The held-out windows of a corpus (None: the embedded one), domain by domain, by the model's own tokenizer."""
    from moesaic.cli.text_source import gather_text
    from moesaic.hub.resolve import weights_place

    place = weights_place(model)
    if place.kind != "folder":
        raise ConfigError(
            f"{model} is no folder, and text is packed with a folder's tokenizer.json; give --text FILE, or make "
            f"a folder with `moesaic convert {model} OUT_FOLDER`"
        )
    packed = gather_text(corpus, 0, place.path).packed
    num_tokens = sum(min(len(domain.held_out), max_tokens) for domain in packed.domains)
    return Batches(num_tokens, packed.names, _held_out(packed, length, max_tokens))


def _held_out(packed: "Packed", length: int, max_tokens: int) -> Iterator[Batch]:
    from moesaic.data.held_out import held_out_windows

    by_domain = held_out_windows(packed, length, max_tokens, batch_size=max(1, BATCH_TOKENS // length))
    for domain, batches in enumerate(by_domain.values()):
        for batch in batches:
            yield Batch(batch.inputs_BS, None if batch.mask_BS.all() else batch.mask_BS, domain)
