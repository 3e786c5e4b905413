"""`moesaic demo`: the whole MoE bargain in minutes: an MoE beside its dense twins, on real text, on this machine."""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moesaic.cli import output
from moesaic.cli.live_block import watch
from moesaic.cli.text_source import Text, add_corpus_argument, gather_text
from moesaic.errors import ConfigError, MoesaicError, RunFolderError

if TYPE_CHECKING:
    from moesaic.config import ModelConfig
    from moesaic.data.packed import Packed
    from moesaic.telemetry.report_data import ModelResult, ReportData
    from moesaic.train.compare import Contender, Outcome
    from moesaic.train.recipe import TrainSettings
    from moesaic.train.resume import RunFolder

VOCAB_SIZE = 4096
WIDE_TWIN_SHARE = 0.3  # of the training time goes to the twin of equal total parameters
FINISH_S = 30.0  # kept for decoding, the report and the command that reloads the model
SLACK = 0.85  # of what the calibration promises: other programs run too
FEWEST_STEPS = 20
PROMPTS = {
    "scripture_en": "And it came to pass",
    "code_python": "def __init__(self",
    "manual_en": "The following example",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic demo`."""
    parser.epilog = "example: moesaic demo --minutes 5 --corpus my-texts"
    parser.add_argument(
        "--minutes", metavar="M", type=float, default=7.0, help="how long it may take, all told (%(default)s)"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where it is written (default: moesaic-demo)")
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="the same seed draws the same weights and batches"
    )
    add_corpus_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the results as one JSON document")


class Schedule(NamedTuple):
    """How many steps fit the time: of the MoE and its narrow twin, and of the wide twin."""

    settings: "TrainSettings"
    wide_steps: int


def run(args: argparse.Namespace) -> int:
    """Train, compare, save and report, within the minutes given. Returns the exit code."""
    from moesaic.train.resume import RunFolder

    started = time.perf_counter()
    if args.minutes < 1:
        raise ConfigError(f"--minutes {args.minutes:g} is too short to show anything; give 1 or more")
    with RunFolder.claim(_fresh_folder(args.out)) as folder:
        text = gather_text(args.corpus, VOCAB_SIZE)
        config = _moe_config(text)
        schedule = _schedule(config, text, args.seed, args.minutes * 60 - (time.perf_counter() - started))
        outcomes = _train_all(config, schedule, text, folder)
        report = _report(outcomes, text, folder, args.seed, schedule)
    _show(report, folder.path, args.json)
    output.talk(f"all of it took {output.duration(time.perf_counter() - started)}")
    output.next_command(report.commands[0].line)
    return 0


def _fresh_folder(out: Path | None) -> Path:
    """The folder asked for, if it is empty; without a wish the first free name."""
    if out is not None:
        if out.exists() and (not out.is_dir() or any(item.name != ".lock" for item in out.iterdir())):
            raise RunFolderError(f"{out} is not an empty folder; choose another one with --out")
        return out
    names = (Path("moesaic-demo" if number == 1 else f"moesaic-demo-{number}") for number in range(1, 1_000_000))
    return next(name for name in names if not name.exists())


def _moe_config(text: "Text[Packed]") -> "ModelConfig":
    from moesaic.train.compare import DEMO_MODEL
    from moesaic.train.recipe import Recipe

    return Recipe(model=DEMO_MODEL).model_config(text.tokenizer.vocab_size, text.packed.eos_id)


def _schedule(config: "ModelConfig", text: "Text[Packed]", seed: int, seconds: float) -> Schedule:
    """Time a few steps of each model, then fill the time that is left."""
    from moesaic.train.compare import contenders, demo_settings, evaluation_steps, step_seconds, with_steps

    output.talk("timing a few steps of each model")
    started = time.perf_counter()
    settings = demo_settings(seed)
    moe_s, narrow_s, wide_s = (
        step_seconds(contender.config, settings, text.packed) for contender in contenders(config, 1, 1)
    )
    evaluating = evaluation_steps(settings, text.packed) * (moe_s + narrow_s + wide_s)
    left = (seconds - (time.perf_counter() - started) - FINISH_S) * SLACK - evaluating
    steps = max(FEWEST_STEPS, int(left * (1 - WIDE_TWIN_SHARE) / (moe_s + narrow_s)))
    settings = with_steps(settings, steps)
    wide = min(steps, max(FEWEST_STEPS, int(left * WIDE_TWIN_SHARE / wide_s)))
    wide = min(steps, -(-wide // settings.evaluate_every) * settings.evaluate_every)
    return Schedule(settings, wide)


def _train_all(config: "ModelConfig", schedule: Schedule, text: "Text[Packed]", folder: "RunFolder") -> "list[Outcome]":
    from moesaic.hub.saving import save
    from moesaic.train.compare import contenders

    outcomes = []
    for contender in contenders(config, schedule.settings.steps, schedule.wide_steps):
        outcome = _train_one(contender, schedule.settings, text)
        if contender.config.moe_layers:
            save(outcome.model, folder.model, tokenizer=text.tokenizer)
        outcomes.append(outcome)
    return outcomes


def _train_one(contender: "Contender", settings: "TrainSettings", text: "Text[Packed]") -> "Outcome":
    from moesaic.train.compare import train_contender

    config = contender.config
    output.talk(
        f"{contender.name}: {output.number(config.total)} parameters, {output.number(config.active_gemm)} active, "
        f"{contender.steps} steps of {settings.tokens_per_step} tokens"
    )
    with watch(contender.name, contender.steps) as listener:
        outcome = train_contender(contender, settings, text.packed, listener=listener)
    output.talk(f"{contender.name}: {outcome.result.bits_per_byte:.3f} bits per byte on held-out text")
    return outcome


def _report(
    outcomes: "list[Outcome]", text: "Text[Packed]", folder: "RunFolder", seed: int, schedule: Schedule
) -> "ReportData":
    from moesaic.telemetry.report import write_report
    from moesaic.telemetry.report_data import Command, Continuation, ReportData
    from moesaic.train.resume import write_beside
    from moesaic.train.verdicts import verdicts

    moe, narrow, wide = outcomes
    prompt = next((PROMPTS[name] for name in text.packed.names if name in PROMPTS), "The")
    words = ["moesaic", "generate", str(folder.model), "--prompt", prompt, "--max-new-tokens", "60"]
    words += ["--temperature", "0.7", "--top-k", "40", "--seed", str(seed)]
    report = ReportData(
        title="One MoE and its dense twins",
        subtitle=f"{schedule.settings.steps} steps of {schedule.settings.tokens_per_step} tokens on {text.source}",
        verdicts=verdicts(moe, narrow.result, wide.result),
        models=tuple(outcome.result for outcome in outcomes),
        domains=text.packed.names,
        loads=moe.loads,
        domain_load=moe.domain_load,
        continuations=(Continuation(prompt=prompt, text=_continue(words)),),
        commands=(
            Command(line=shlex.join(words), purpose="reload the MoE and continue a prompt"),
            Command(line="moesaic chat", purpose="talk to a model that knows more, upcycled into an MoE"),
            Command(line=f"moesaic count {folder.model}", purpose="count what is total and what is active"),
        ),
        facts=(
            ("machine", f"{platform.machine()}, {_threads()} threads"),
            ("corpus", f"{text.source}, {output.size(text.num_bytes)}"),
            ("seed", str(seed)),
        ),
    )
    write_report(report, folder.path / "report.html")
    write_beside(folder.path / "report.json", json.dumps(report.to_json(), indent=1))
    return report


def _continue(words: list[str]) -> str:
    """Run the command a user would type next, as it stands, in a process of its own; returns the continuation."""
    command = [sys.executable, "-m", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise MoesaicError(f"`{shlex.join(words)}` failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)["text"]


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _show(report: "ReportData", folder: Path, as_json: bool) -> None:
    page = folder / "report.html"
    if as_json:
        output.print_json({"report": str(page), **_without_series(report)})
        return
    output.table(("", *(model.name for model in report.models)), _rows(report.models))
    output.write("\n" + "".join(f"{_mark(v.is_good)} {v.text}\n" for v in report.verdicts))
    for sample in report.continuations:
        output.write(f"\n{sample.prompt}|{sample.text}\n")
    output.write(f"\nfigures, and the load of every expert over time: {page}\n")


def _mark(is_good: bool | None) -> str:
    return {True: "+", False: "-", None: " "}[is_good]


def _rows(models: "tuple[ModelResult, ...]") -> list[tuple[str, ...]]:
    rows = [
        ("parameters, total", [output.number(m.total_parameters) for m in models]),
        ("parameters, active", [output.number(m.active_parameters) for m in models]),
        ("training tokens", [output.number(m.training_tokens) for m in models]),
        ("held-out bits per byte", [f"{m.bits_per_byte:.3f}" for m in models]),
        *((f"  {name}", [f"{m.domain_bits_per_byte[name]:.3f}" for m in models]) for name in _domains(models)),
        ("training tokens/s", [f"{m.training_tokens_per_s:.0f}" for m in models]),
        ("decoding tokens/s", [f"{m.decoding_tokens_per_s:.0f}" for m in models]),
        ("peak memory in training", [output.size(m.peak_memory_bytes) for m in models]),
        ("training time", [output.duration(m.training_time_s) for m in models]),
        ("training compute, TFLOP", [f"{m.training_flops / 1e12:.1f}" for m in models]),
    ]
    return [(name, *cells) for name, cells in rows]


def _domains(models: "tuple[ModelResult, ...]") -> list[str]:
    return list(models[0].domain_bits_per_byte)


def _without_series(report: "ReportData") -> dict[str, Any]:
    tree = report.to_json()
    return {name: value for name, value in tree.items() if name not in ("loads", "domain_load")}
