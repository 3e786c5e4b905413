"""What `moesaic inspect` looks at: a trace that is there already, or a model, its text, and the trace of the two."""

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moesaic.cli import output
from moesaic.errors import ConfigError, RunFolderError
from moesaic.trace import Trace

if TYPE_CHECKING:
    from moesaic.data.tokenizer import Tokenizer
    from moesaic.telemetry.inspection.inspection import Agreement
    from moesaic.telemetry.inspection.routed import Routed
    from moesaic.telemetry.inspection.tokens import TokenTexts
    from moesaic.telemetry.inspection.windows import Windows

TRACE_SUFFIX = ".npz"
SEQUENCE_LENGTH = 256  # short windows: many pieces of text tell more of a domain than few long ones
MOST_CHECKPOINTS = 12  # of a run, spread over it


class Asked(NamedTuple):
    """A model or a trace that was named. run: the run folder that it is the model of."""

    name: str
    path: str
    is_trace: bool
    run: Path | None = None


class Seen(NamedTuple):
    """A trace, its tokens' texts where they are known, and the windows that went in (None for a recording)."""

    trace: Trace
    texts: "TokenTexts | None"
    windows: "Windows | None"


def asked_for(name: str) -> Asked:
    """What a name means: a run's folder stands for its finished model, or its newest checkpoint until then."""
    path = Path(name)
    if name.endswith(TRACE_SUFFIX):
        return Asked(path.stem, name, True)
    if (path / "sweep.json").is_file():
        raise RunFolderError(f"{name} holds a sweep; name one of the folders in it, each is a run")
    if not (path / "recipe.json").is_file():
        return Asked(path.name or name, name, False)
    return Asked(path.resolve().name, str(_model_of_run(path)), False, path)


def _model_of_run(run: Path) -> Path:
    if (run / "model" / "config.json").is_file():
        return run / "model"
    from moesaic.train.resume import RunFolder

    checkpoints = RunFolder(run).checkpoints
    if not checkpoints:
        raise RunFolderError(f"{run} has written no checkpoint yet; wait, or follow it with `moesaic watch {run}`")
    step, folder = checkpoints[-1]
    output.talk(f"{run} has not finished: inspecting its checkpoint of step {step}")
    return folder


def see(asked: Asked, args: argparse.Namespace, scratch: Path) -> Seen:
    """Open a trace, or record one in the folder `scratch`."""
    if asked.is_trace:
        return _recording(asked, args.tokenizer)
    if reason := _not_ours(asked.path):
        return _see_with_transformers(asked, args, scratch, reason)
    from moesaic.telemetry.inspection.tokens import TokenTexts

    model = open_routed(asked.path)
    tokenizer = _tokenizer(asked.path)
    windows = _windows(asked, args, tokenizer, _length(args.sequence_length, model.context_length))
    trace = _record(asked.name, model, windows, scratch / f"{len(list(scratch.iterdir()))}{TRACE_SUFFIX}")
    return Seen(trace, TokenTexts(tokenizer), windows)


def _recording(asked: Asked, tokenizer_folder: Path | None) -> Seen:
    trace = Trace.open(asked.path)
    if tokenizer_folder is None:
        output.talk(f"{asked.path} brings no tokenizer: tokens are shown by number; --tokenizer FOLDER spells them")
        return Seen(trace, None, None)
    from moesaic.data.tokenizer import Tokenizer
    from moesaic.telemetry.inspection.tokens import TokenTexts

    return Seen(trace, TokenTexts(Tokenizer.load(tokenizer_folder)), None)


def _not_ours(path: str) -> str | None:
    """Why moesaic does not read the description of a model that another program may read; None where it does."""
    from moesaic import hub
    from moesaic.hub.resolve import locate

    if locate(path).kind != "folder":
        return None
    try:
        hub.read_config(path)
    except ConfigError as error:
        return str(error)
    return None


def _see_with_transformers(asked: Asked, args: argparse.Namespace, scratch: Path, reason: str) -> Seen:
    """A model of a family that moesaic does not read, run by transformers."""
    from moesaic.errors import MissingDependencyError

    try:
        from moesaic.hub.transformers import open_model, record_routing
    except MissingDependencyError as error:
        raise ConfigError(f"{reason} (transformers might read it, and is not installed)") from error
    import torch

    from moesaic.telemetry.inspection.routed import check_known
    from moesaic.telemetry.inspection.tokens import TokenTexts

    output.talk(f"{reason}; transformers runs it instead")
    model, tokenizer = open_model(asked.path), _tokenizer(asked.path)
    config: Any = model.config
    context_length = getattr(config, "max_position_embeddings", None) or SEQUENCE_LENGTH
    windows = _windows(asked, args, tokenizer, _length(args.sequence_length, context_length))
    check_known(windows, config.vocab_size)
    batches = [
        (windows.domains[window.domain], torch.from_numpy(window.token_ids_T.astype("int64"))[None])
        for window in windows.windows
    ]
    path = scratch / f"{len(list(scratch.iterdir()))}{TRACE_SUFFIX}"
    with output.progress(f"routing through {asked.name}") as advance:
        trace = record_routing(model, batches, path)
        advance(1, f"{windows.num_tokens} tokens")
    return Seen(trace, TokenTexts(tokenizer), windows)


def open_routed(path: str) -> "Routed":
    """A checkpoint that tells where its tokens go."""
    from moesaic.telemetry.inspection import routed

    importlib.import_module("moesaic.tune.upcycle")  # makes known the preset whose weights it makes
    return routed.open_routed(path)


def _tokenizer(path: str) -> "Tokenizer":
    from moesaic.data.open_tokenizer import open_tokenizer

    return open_tokenizer(path)


def _length(asked: int | None, context_length: int) -> int:
    length = asked or min(SEQUENCE_LENGTH, context_length)
    if not 1 <= length <= context_length:
        raise ConfigError(f"--sequence-length {length}; this model takes 1 to {context_length} tokens")
    return length


def _record(name: str, model: "Routed", windows: "Windows", path: Path) -> Trace:
    from moesaic.telemetry.inspection.routed import record

    with output.progress(f"routing through {name}", windows.num_tokens) as advance:
        done = 0
        for num_tokens in record(model, windows, path):
            done += num_tokens
            advance(num_tokens, f"{done} tokens")
    return Trace.open(path)


def _windows(asked: Asked, args: argparse.Namespace, tokenizer: "Tokenizer", length: int) -> "Windows":
    from moesaic.cli.text_source import gather_text, read_corpus
    from moesaic.data.packed import is_packed
    from moesaic.telemetry.inspection.windows import corpus_windows, file_windows, packed_windows

    data = args.data or _data_of_run(asked.run)
    if data is not None and not data.exists():
        raise ConfigError(f"no file or folder {data}; check the path of --data")
    if data is not None and data.is_file():
        return file_windows(data, tokenizer, length, args.max_tokens)
    if data is not None and is_packed(data):
        text = gather_text(data, 0, _folder(asked.path))
        return packed_windows(text.packed, length, args.max_tokens)
    corpus = read_corpus(data)
    with output.progress("tokenizing") as advance:
        windows = corpus_windows(corpus, tokenizer, length, args.max_tokens)
        advance(1, f"{windows.num_tokens} tokens of {len(windows.domains)} domains")
    return windows


def _folder(path: str) -> Path:
    from moesaic.hub.resolve import weights_place

    place = weights_place(path)
    if place.kind != "folder":
        raise ConfigError(f"{path} is no folder, and packed text must be of its folder's tokenizer; give plain text")
    return place.path


def _data_of_run(run: Path | None) -> Path | None:
    """The text that a run says it learned from, where it is still there."""
    if run is None:
        return None
    try:
        folder = json.loads((run / "recipe.json").read_text(encoding="utf-8"))["corpus_folder"]
        return Path(folder) if folder and Path(folder).exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{run / 'recipe.json'} does not say what the run learned from ({type(error).__name__}: {error}); "
            "name a text with --data"
        ) from error


def saturation(run: Path, seen: Seen, scratch: Path) -> "Agreement | None":
    """How much of a run's final choices each of its checkpoints made, over the same windows; None with fewer than two.

    A checkpoint that the run deletes in the meantime is left out.
    """
    from moesaic.telemetry.inspection.inspection import agree
    from moesaic.train.resume import RunFolder

    checkpoints = RunFolder(run).checkpoints
    if len(checkpoints) < 2 or seen.windows is None:
        return None
    traces = {}
    for step, folder in _spread(checkpoints):
        if not folder.exists():
            output.talk(f"{folder} is gone: the run keeps its newest only")
            continue
        traces[f"step {step}"] = _record(f"step {step}", open_routed(str(folder)), seen.windows, scratch / folder.name)
    return agree(list(traces), list(traces.values()), seen.trace) if traces else None


def _spread(checkpoints: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """At most so many, the first and the last among them."""
    last, most = len(checkpoints) - 1, min(len(checkpoints), MOST_CHECKPOINTS)
    return [checkpoints[round(at * last / (most - 1))] for at in range(most)]
