"""`moesaic doctor`: looks at a model's routers and experts on some text, and says what is ill and what would help."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli import output
from moesaic.cli.trace import DTYPES, Batches, known, read_corpus, read_text, window_length
from moesaic.errors import ConfigError, RunFolderError

if TYPE_CHECKING:
    from moesaic.train.doctor.change import LayerChange
    from moesaic.train.doctor.examination import Examination, LayerReport

MAX_TOKENS = 8192

EXAMPLES = """\
example: moesaic doctor runs/first  # the newest checkpoint of a run, on the embedded text
example: moesaic doctor OLMoE-1B-7B --data my-texts --json
example: moesaic doctor tuned --against OLMoE-1B-7B --data my-texts  # what fine-tuning did to the routers
To treat a model while it is trained: moesaic train --doctor act"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic doctor`."""
    parser.epilog = EXAMPLES
    parser.add_argument("model", metavar="CHECKPOINT", help="a checkpoint folder, a .gguf file, or a run's folder")
    parser.add_argument(
        "--against",
        metavar="EARLIER",
        help="also say how its routers have changed since this checkpoint (of a run: since the checkpoint before)",
    )
    parser.add_argument(
        "--data",
        metavar="TEXT",
        type=Path,
        help="a UTF-8 file, or a folder of text whose held-out part is read, as `moesaic train` takes it (default: the "
        "embedded corpus)",
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=MAX_TOKENS, help="read at most N tokens a domain (%(default)s)"
    )
    parser.add_argument("--sequence-length", metavar="N", type=int, help="tokens of a window (512, or the context)")
    parser.add_argument("--dtype", choices=DTYPES, help="compute in this format (the checkpoint's if not given)")
    parser.add_argument("--json", action="store_true", help="print one JSON document, with every expert's state")


def run(args: argparse.Namespace) -> int:
    """Examine a checkpoint and print what was found. Returns the exit code."""
    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens {args.max_tokens}; give 1 or more")
    place = checkpoint_in(args.model)
    against = checkpoint_in(args.against) if args.against else _one_before(args.model, place)
    if against is not None:
        _check_comparable(against, place)
    examination = _examine(place, args)
    changed = () if against is None else _changes(against, examination, args)
    if args.json:
        since = {} if against is None else {"against": against, "changes": [_change_json(each) for each in changed]}
        output.print_json({"checkpoint": place, **examination.to_json(), **since})
    else:
        _show(place, examination)
        if against is not None:
            _show_changes(against, changed)
    if any(advice for _, advice in examination.advice()):
        run = "FOLDER" if place == args.model else args.model
        output.next_command(f"moesaic train --doctor act --out {run} --resume  # lets the doctor act while training")
    return 0


def checkpoint_in(model: str) -> str:
    """The model itself, or of a run's folder its finished model or newest checkpoint, also while it is being trained.

    Raises RunFolderError for a run that has none yet.
    """
    path = Path(model)
    if not path.is_dir() or (path / "config.json").exists():
        return model
    if not (path / "recipe.json").exists() and not (path / "checkpoints").is_dir():
        return model  # whoever loads it says what is wrong
    from moesaic.train.resume import RunFolder

    run = RunFolder(path)
    found = [run.model] if (run.model / "config.json").exists() else [folder for _, folder in run.checkpoints[-1:]]
    if not found:
        raise RunFolderError(f"{path} is a run without a checkpoint yet; wait until its first one is written")
    if not (found[0] / "config.json").exists():
        raise RunFolderError(
            f"{found[0]} keeps weights that only this run can go on from (its family has no such model); "
            "watch it from inside, with `moesaic train --resume --doctor advise`"
        )
    output.talk(f"{path} is a run; this is {found[0]}")
    return str(found[0])


def _one_before(model: str, place: str) -> str | None:
    """Of a run's folder the newest checkpoint that is older than what is looked at; None without one."""
    if place == model:
        return None
    from moesaic.train.resume import RunFolder

    run = RunFolder(Path(model))
    older = [str(folder) for _, folder in run.checkpoints if str(folder) != place and (folder / "config.json").exists()]
    if place == str(run.model):
        older = older[:-1]  # the last checkpoint is the finished model
    return older[-1] if older else None


def _check_comparable(against: str, place: str) -> None:
    """Raise ConfigError for two models that no examination could compare, before minutes go into one."""
    from moesaic import hub
    from moesaic.trace import Fingerprint

    configs = [hub.read_config(each) for each in (against, place)]
    for config in configs:
        config.check_decoder_only("the doctor")
    shapes = [Fingerprint.of(config).num_experts for config in configs]
    if shapes[0] != shapes[1]:
        said = [
            f"{each} routes in layers of {_of_layers(shape)}"
            for each, shape in zip((against, place), shapes, strict=True)
        ]
        raise ConfigError(f"{', and '.join(said)}; --against takes an earlier checkpoint of the same model")


def _of_layers(num_experts: dict[int, int]) -> str:
    """`8 experts (0, 1, 2)`."""
    sizes: dict[int, list[int]] = {}
    for layer, experts in num_experts.items():
        sizes.setdefault(experts, []).append(layer)
    return " and of ".join(f"{experts} experts ({_numbers(layers)})" for experts, layers in sizes.items())


def _numbers(layers: list[int]) -> str:
    is_run = len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if is_run else ", ".join(map(str, layers))


def _changes(against: str, later: "Examination", args: argparse.Namespace) -> "tuple[LayerChange, ...]":
    from moesaic.train.doctor.change import changes

    return changes(_examine(against, args), later)


def _change_json(change: "LayerChange") -> dict[str, Any]:
    return {
        "layer": change.layer,
        "shared": change.shared.share,
        "chance": change.shared.chance,
        "moved": change.moved,
        "died": list(change.died),
        "revived": list(change.revived),
        "state": change.state,
        "sentence": change.sentence,
    }


def _show_changes(against: str, changed: "tuple[LayerChange, ...]") -> None:
    rows = [
        [
            str(each.layer),
            f"{each.shared.share:.1%}",
            f"{each.shared.chance:.1%}",
            f"{each.moved:.1%}",
            ", ".join(map(str, each.died)) or "-",
            each.state,
        ]
        for each in changed
    ]
    output.write("\n")
    output.table(("layer", "same choices", "by chance", "load moved", "died", "router"), rows, f"since {against}")
    for each in changed:
        if each.state == "unsettled" or each.died:
            output.write(f"{each.sentence}.\n")


def _examine(place: str, args: argparse.Namespace) -> "Examination":
    from moesaic import hub
    from moesaic.cli.text import open_model
    from moesaic.config import MoeConfig
    from moesaic.models.build import decoder_only
    from moesaic.train.doctor.examination import examine

    config = hub.read_config(place)
    config.check_decoder_only("the doctor")
    if not any(isinstance(layer.feed_forward, MoeConfig) for layer in config.layers):
        raise ConfigError(
            f"{place} ({config.family}) has no experts: every layer is dense, and the doctor looks at routers; "
            "give it a mixture-of-experts model"
        )
    length = window_length(args.sequence_length, config)
    data: Path | None = args.data
    is_file = data is not None and not data.is_dir()
    # Before the model: a wrong path should be answered at once.
    text = data.read_bytes() if data is not None and is_file else b""
    opened = open_model(place, args.dtype)
    if data is not None and is_file:
        found = read_text(opened, text, data, args.max_tokens, length)
    else:
        found = read_corpus(place, data, args.max_tokens, length)
    found = known(found, config.vocab_size)
    with output.progress("examining", found.num_tokens) as advance:
        return examine(
            decoder_only(opened.model, "the doctor"), _questions(found, advance), num_domains=len(found.domains)
        )


def _questions(found: Batches, advance: Any) -> Any:
    import torch

    from moesaic.train.doctor.examination import Question

    for batch in found.batches:
        mask_BS = None if batch.mask_BS is None else torch.from_numpy(batch.mask_BS)
        yield Question(torch.from_numpy(batch.token_ids_BS), mask_BS, -1 if batch.domain is None else batch.domain)
        advance(batch.token_ids_BS.size, "")


STATES = {"dead": "dead", "cold": "cold", "oversized": "oversized", "can't tell": "unknown"}
COLUMNS = ("layer", "MaxVio", "load entropy", "effective", *STATES, "twins", "logits", "flips")


def _show(place: str, examination: "Examination") -> None:
    layers = zip(examination.layers, examination.health.layers, strict=True)
    rows = [_row(report, judged) for report, judged in layers]
    output.table(COLUMNS, rows, f"{place}: {examination.num_tokens} tokens")
    for finding, advice in examination.advice():
        could = f"Training could: {advice}" if advice else "Healthy models have such experts, too; no remedy is given"
        output.write(f"{finding.sentence}.\n  {could}.\n")
    if not examination.findings:
        output.write("Nothing is ill.\n")


def _row(report: "LayerReport", judged: Any) -> list[str]:
    logits = report.load.logits
    return [
        str(report.load.layer),
        f"{judged.max_violation:.2f}",
        f"{judged.load_entropy:.3f}",
        f"{judged.effective_experts:.1f} of {report.load.num_experts}",
        *(str(report.number(state)) for state in STATES.values()),
        str(len(report.duplicates)),
        "-" if logits is None else f"{logits.rms:.1f}",
        "-" if logits is None else f"{logits.flips_bf16:.1%}",
    ]
