"""`moesaic loadtest`: what users of a server would feel, measured from outside; any server of OpenAI's protocol."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli import output
from moesaic.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    import asyncio

    from moesaic.serve.loadtest.summary import Spread, Summary
    from moesaic.serve.loadtest.workload import Workload

KEY_VARIABLES = ("MOESAIC_API_KEY", "OPENAI_API_KEY")
REQUESTS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic loadtest`."""
    parser.epilog = (
        "example: moesaic loadtest http://127.0.0.1:8000 --concurrency 16 --requests 200\n"
        "example: moesaic loadtest http://127.0.0.1:8000 --rate 2 --duration 120 --prefix-tokens 1000 --plot load.html"
    )
    parser.add_argument("url", metavar="URL", help="the server, such as http://127.0.0.1:8000")
    parser.add_argument("--model", metavar="NAME", help="ask this model (the first that the server lists)")
    arrivals = parser.add_mutually_exclusive_group()
    arrivals.add_argument("--rate", metavar="R", type=float, help="send R requests a second, at random times (Poisson)")
    arrivals.add_argument(
        "--concurrency",
        metavar="N",
        type=int,
        default=8,
        help="else N clients that wait for their answers (%(default)s)",
    )
    parser.add_argument(
        "--requests", metavar="N", type=int, help=f"send N in all ({REQUESTS} if no --duration is given)"
    )
    parser.add_argument("--duration", metavar="S", type=float, help="send nothing new after S seconds")
    for name, what in (("prompt", "prompts"), ("output", "answers")):
        parser.add_argument(
            f"--{name}-tokens",
            metavar="N",
            type=_length,
            default="sharegpt",
            help=f"length of {what}; sharegpt: as conversations have them (%(default)s)",
        )
    parser.add_argument(
        "--prefix-tokens",
        metavar="N",
        type=int,
        default=0,
        help="begin each prompt with N tokens that others share (%(default)s)",
    )
    parser.add_argument("--prefixes", metavar="N", type=int, default=1, help="of N different ones (%(default)s)")
    parser.add_argument("--chat", action="store_true", help="ask /v1/chat/completions instead of /v1/completions")
    parser.add_argument(
        "--field",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="put this into each request, beside temperature=0 and ignore_eos=true; null leaves one out",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="the same seed asks the same (%(default)s)")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the test as an .html page or .svg picture")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Drive the load and report. Returns the exit code: 2 if nothing was answered."""
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("moesaic loadtest needs httpx; run: pip install 'moesaic[serve]'") from error
    from moesaic.serve.loadtest.driving import Progress
    from moesaic.serve.loadtest.summary import summarize

    workload, progress = _workload(args), Progress()
    if args.plot is not None and not args.plot.parent.is_dir():
        raise ConfigError(f"--plot {args.plot}; there is no folder {args.plot.parent}, make it first")
    interrupted = _drive(args, workload, progress)
    summary = summarize(progress.done)
    if args.plot is not None:
        from moesaic.serve.loadtest import plot

        plot.write(args.plot, f"{args.url}: {_in_words(workload)}", progress.done)
        output.talk(f"drawn: {args.plot}")
    if args.json:
        output.print_json({"url": args.url, "workload": vars(workload), **summary.to_dict()})
    else:
        _print(summary, _in_words(workload))
    if interrupted:
        output.talk("interrupted: these are the requests that had ended")
        return 130
    return 0 if summary.completed else 2


def _drive(args: argparse.Namespace, workload: "Workload", progress: Any) -> bool:
    """Whether Ctrl-C ended it."""
    import asyncio

    from moesaic.serve.loadtest.asking import Server
    from moesaic.serve.loadtest.driving import drive
    from moesaic.serve.loadtest.view import shown

    fields = dict(_field(word) for word in args.field)
    key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)

    async def test() -> None:
        server = Server(args.url, model=args.model, chat=args.chat, key=key, fields=fields)
        try:
            async with shown(progress):
                await drive(server, workload, progress)
        finally:
            await server.close()

    try:
        with asyncio.Runner(loop_factory=_quick_loop()) as runner:
            runner.run(test())
    except KeyboardInterrupt:
        return True
    return False


def _quick_loop() -> "Callable[[], asyncio.AbstractEventLoop] | None":
    """uvloop where there is one (not on Windows): a server on this machine gets the processors that it saves."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _workload(args: argparse.Namespace) -> "Workload":
    from moesaic.serve.loadtest.workload import Workload

    requests = REQUESTS if args.requests is None and args.duration is None else args.requests
    return Workload(
        rate=args.rate,
        concurrency=args.concurrency,
        requests=requests,
        seconds=args.duration,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        prefix_tokens=args.prefix_tokens,
        prefixes=args.prefixes,
        seed=args.seed,
    )


def _length(text: str) -> int | str:
    if text != "sharegpt" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}; give a number of tokens, or sharegpt")
    return text if text == "sharegpt" else int(text)


def _field(word: str) -> tuple[str, Any]:
    name, separator, value = word.partition("=")
    if not separator or not name:
        raise ConfigError(f"--field {word}; write name=value, for example temperature=0.7")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _in_words(workload: "Workload") -> str:
    arrivals = f"{workload.rate:g} requests/s" if workload.rate is not None else f"{workload.concurrency} clients"
    prefix = f", {workload.prefix_tokens} shared" if workload.prefix_tokens else ""
    return f"{arrivals}, prompts {workload.prompt_tokens}{prefix}, answers {workload.output_tokens} tokens"


def _print(summary: "Summary", title: str) -> None:
    rows = [
        _row("first token", summary.first_token_s, "s"),
        _row("between tokens", summary.inter_token_s, "s"),
        _row("whole request", summary.end_to_end_s, "s"),
        _row("tokens/s of a user", summary.token_speed, ""),
    ]
    output.table(("", "mean", "p50", "p90", "p95", "p99", "max"), rows, title)
    output.write("\n")
    errors = ", ".join(f"{count} x {kind}" for kind, count in summary.errors.items()) or "none"
    facts = [
        ("requests", f"{summary.completed} of {summary.requests} answered in {output.duration(summary.seconds)}"),
        ("errors", errors),
        ("throughput", f"{summary.output_tokens_per_s:.1f} tokens/s, {summary.requests_per_s:.2f} requests/s"),
        ("tokens", f"{summary.prompt_tokens} in ({summary.cached_tokens} cached), {summary.output_tokens} out"),
    ]
    output.table(("", ""), facts)


def _row(name: str, spread: "Spread", unit: str) -> list[str]:
    from moesaic.telemetry.scale import short

    values = [spread.mean, *spread.percentiles.values(), spread.most]
    return [name, *(short(value * 1e3, "ms") if unit else f"{value:.1f}" for value in values)]
