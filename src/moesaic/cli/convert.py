"""`moesaic convert`: any checkpoint that moesaic reads becomes a Hugging Face safetensors folder."""

import argparse
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moesaic.cli import output
from moesaic.cli.text import DTYPES, open_model
from moesaic.data.open_tokenizer import open_tokenizer
from moesaic.errors import CheckpointError, ConfigError, RunFolderError
from moesaic.hub.checkpoint import CONFIG, some
from moesaic.hub.layouts import LAYOUTS
from moesaic.hub.quantization import FORMATS

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Upcycling(NamedTuple):
    """Copies of each dense block, and the shards that each copy is cut into: copies x shards experts."""

    copies: int
    shards: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic convert`."""
    parser.epilog = "example: moesaic convert SmolLM2-135M-Instruct.gguf smollm2 --dtype bf16"
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a .gguf file")
    parser.add_argument("folder", metavar="OUT_FOLDER", help="where the new checkpoint goes")
    parser.add_argument(
        "--dtype",
        choices=FORMATS,
        help="number format of the weights (as read if not given); fp8 in blocks of 128 x 128, mxfp4 for gpt-oss "
        "and DeepSeek-V4",
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, help="a tensor per expert, or stacked as in transformers 5 (as read if not given)"
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default="2GB", help="largest file, as 500MB or 2GB (%(default)s)"
    )
    parser.add_argument(
        "--upcycle",
        metavar="COPIESxSHARDS",
        help="make a dense model an MoE of the same function: 2x4 makes 8 experts, 4 of them active",
    )
    parser.add_argument("--check", action="store_true", help="refuse weights that are NaN or infinite")
    parser.add_argument(
        "--allow-extra", action="store_true", help="leave out tensors that the configuration does not describe"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT_FOLDER holds")
    parser.add_argument("--json", action="store_true", help="print what was written as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Read a checkpoint and write it as a Hugging Face folder. Returns the exit code."""
    folder = Path(args.folder)
    max_shard_bytes = parse_size(args.max_shard_size)
    upcycling = parse_upcycling(args.upcycle) if args.upcycle else None
    check_target(Path(args.model), folder, args.overwrite)
    document = _upcycle(args, upcycling, max_shard_bytes) if upcycling else _convert(args, max_shard_bytes)
    if args.json:
        output.print_json(document)
    output.next_command(f'moesaic generate {folder} --prompt "Once upon a time"')
    return 0


def _convert(args: argparse.Namespace, max_shard_bytes: int) -> dict[str, Any]:
    """File to file, never the whole model in memory."""
    from moesaic.hub.resolve import locate

    locate(args.model)  # a mistyped name is answered before seconds go into importing torch
    importlib.import_module("moesaic.tune.upcycle")  # makes known the preset whose weights it makes
    from moesaic.hub.resolve import weights_place
    from moesaic.hub.streaming import convert

    place = weights_place(args.model)
    tokenizer = None if place.kind == "folder" else open_tokenizer(args.model)
    with output.progress(f"writing {args.folder}", total=1000) as advance:
        shown = Thousandths(advance)
        done = convert(
            args.model,
            args.folder,
            dtype=args.dtype,
            layout=args.layout,
            max_shard_bytes=max_shard_bytes,
            tokenizer=tokenizer,
            allow_extra=args.allow_extra,
            check=args.check,
            advance=shown.add,
        )
    if done.left_out:
        output.talk(f"left out {len(done.left_out)} tensors: {some(done.left_out, 8)}")
    return {"folder": str(args.folder), **done._asdict()}


class Thousandths:
    """Bytes of very large files as steps of a progress bar."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self._advance, self._bytes, self._shown = advance, 0, 0

    def add(self, num_bytes: int, total_bytes: int) -> None:
        self._bytes += num_bytes
        reached = self._bytes * 1000 // max(1, total_bytes)
        if reached > self._shown:
            self._advance(reached - self._shown, note=output.size(self._bytes))
            self._shown = reached


def _upcycle(args: argparse.Namespace, upcycling: Upcycling, max_shard_bytes: int) -> dict[str, Any]:
    """Through a model in memory, since its function is changed on the way."""
    for option, value in (("--layout", args.layout), ("--check", args.check), ("--allow-extra", args.allow_extra)):
        if value:
            raise ConfigError(f"{option} does not go with --upcycle; convert once more afterwards")
    if args.dtype not in (None, *DTYPES):
        raise ConfigError(f"--dtype {args.dtype} does not go with --upcycle; convert once more afterwards")
    from moesaic import hub
    from moesaic.hub.resolve import weights_place
    from moesaic.hub.sources import open_source
    from moesaic.hub.streaming import copy_others
    from moesaic.models.build import decoder_only
    from moesaic.tune.upcycle import upcycle

    config = hub.read_config(args.model)
    config.check_decoder_only("upcycling")
    with output.progress(f"reading {args.model} ({output.number(config.total)} parameters)"):
        model, tokenizer = open_model(args.model, args.dtype)
    with output.progress(f"upcycling to {upcycling.copies * upcycling.shards} experts"):
        dense = decoder_only(model, "upcycling")
        model = upcycle(dense, copies=upcycling.copies, shards=upcycling.shards, top_k=upcycling.shards)
    with output.progress(f"writing {args.folder}"):
        hub.save(model, args.folder, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)
        copy_others(open_source(weights_place(args.model)), Path(args.folder), apart=(CONFIG,))
    return {"folder": str(args.folder), "total": model.config.total, "active_all": model.config.active_all}


def parse_size(text: str) -> int:
    """Bytes of `500MB` or `2GiB`. Raises ConfigError for anything else, and for less than 1 MB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    unit = found[2] + ("" if found[2].endswith("B") or not found[2] else "B") if found else ""
    num_bytes = int(float(found[1]) * _UNITS[unit]) if found and unit in _UNITS else 0
    if num_bytes < 10**6:
        raise ConfigError(f"--max-shard-size {text}; give 1MB or more, for example 500MB or 2GB")
    return num_bytes


def parse_upcycling(text: str) -> Upcycling:
    """`2x4` as copies and shards. Raises ConfigError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if not found:
        raise ConfigError(f"--upcycle {text}; give copies x shards, for example 2x4")
    return Upcycling(int(found[1]), int(found[2]))


def check_target(source: Path, folder: Path, overwrite: bool, named: str = "OUT_FOLDER") -> None:
    """Complain before the work about a folder, `named` so in messages, that is the source, a file or in use."""
    if folder.is_dir() and source.exists() and folder.samefile(source):
        raise CheckpointError(f"{folder} is the checkpoint to read; choose another {named}")
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file; choose another {named}")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise RunFolderError(f"{folder} is not empty; choose another {named} or add --overwrite")
