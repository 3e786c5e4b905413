"""`moesaic <verb> ...`: finds the verb's module, runs it, and turns every failure into one line and an exit code.

Exit codes: 0 done, 1 a bug of ours, 2 something the user can put right, 130 interrupted, 141 the reader hung up.
A verb is a module `moesaic.cli.<verb>` with `add_arguments(parser)` and `run(args) -> int`.
"""

import argparse
import errno
import importlib
import os
import sys
import traceback
from typing import Any, NamedTuple, NoReturn

from moesaic import __version__
from moesaic.cli import output
from moesaic.errors import OUT_OF_MEMORY, ConfigError, MoesaicError, ran_out_of_memory
from moesaic.registry import unknown_name

VERBS = {
    "demo": "train a small MoE and its dense twins on real text, and compare them",
    "pack": "turn text into token shards that training maps into memory",
    "align": "turn translations of one text into pairs to learn translating from",
    "train": "train a model, or a sweep of models, from a recipe",
    "generate": "continue a prompt",
    "chat": "talk to a model",
    "inspect": "see what a model's experts are for, on a page",
    "watch": "follow a run on a page that stays on this machine",
    "doctor": "say what is ill about a model's routers and experts, and what would help",
    "trace": "record which expert serves which token, or show such a recording",
    "count": "count a model's parameters, bytes and FLOPs without loading it",
    "plan": "say what a model needs of a machine, how fast it is there, and what it costs",
    "convert": "turn a checkpoint into a Hugging Face safetensors folder",
    "quantize": "round a checkpoint's weights to 8 or 4 bits",
    "lint": "find out by experiment what a training set-up does to its experts",
    "serve": "answer many users over HTTP, as OpenAI's and Anthropic's clients ask",
    "loadtest": "load a server as its users would, and say what they would feel",
    "bench": "measure this machine, and how near to its limits a model runs",
}
EXAMPLE = "example: moesaic count mixtral-8x7b"

_HINTS: dict[type[OSError], str] = {
    PermissionError: "; choose a place that you may read and write",
    FileNotFoundError: "; check the path",
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Failure(NamedTuple):
    """What the user is told, and the exit code; no line at all when `line` is empty."""

    line: str
    exit_code: int


class Parser(argparse.ArgumentParser):
    """Reports misuse as an error like any other: one line that names the help to read."""

    def __init__(self, prog: str, **settings: str | None) -> None:
        super().__init__(
            prog,
            description=settings.get("description"),
            epilog=settings.get("epilog"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def print_help(self, file: Any = None) -> None:
        """Write the help as data: to stdout, whatever `file` says."""
        output.write(self.format_help())

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError where argparse would print and exit."""
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns its exit code and raises nothing."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        exit_code = _dispatch(words)
        sys.stdout.flush()
        return exit_code
    except SystemExit as stop:  # argparse leaves this way after --help
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        _forget_stdout()
        return 141
    except BaseException as error:
        if "--debug" in words:
            traceback.print_exc()
        failure = explain(error)
        output.talk(failure.line)
        return failure.exit_code


def explain(error: BaseException) -> Failure:
    """What went wrong in one line, and whether the user can do something about it (2) or we must (1)."""
    if isinstance(error, MoesaicError):
        return Failure(f"moesaic: error: {_one_line(error)}", 2)
    if isinstance(error, KeyboardInterrupt):
        why = _one_line(error)
        return Failure(f"moesaic: interrupted: {why}" if why else "moesaic: interrupted", 130)
    if ran_out_of_memory(error):
        return Failure(f"moesaic: error: {OUT_OF_MEMORY}", 2)
    if isinstance(error, OSError):
        return Failure(f"moesaic: error: {_explain_os_error(error)}", 2)
    bug = f"moesaic: this is a bug in moesaic ({type(error).__name__}: {_one_line(error)})"
    return Failure(f"{bug}; run it again with --debug and report what it prints", 1)


def verb_parser(verb: str) -> Parser:
    """The parser of one verb, options that every verb has included."""
    module = importlib.import_module(f"moesaic.cli.{verb}")
    parser = Parser(f"moesaic {verb}", description=VERBS[verb])
    module.add_arguments(parser)
    _add_common_options(parser)
    return parser


def main_parser() -> Parser:
    """The parser of what stands before the verb."""
    lines = "\n".join(f"  {verb:<10}{summary}" for verb, summary in VERBS.items())
    parser = Parser(
        "moesaic",
        description=f"Build, train, look into and run mixture-of-experts language models.\n\nverbs:\n{lines}",
        epilog=f"`moesaic <verb> --help` tells more\n{EXAMPLE}",
    )
    parser.usage = "moesaic [--help] [--version] [--debug] [--verbose] <verb> ..."
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    _add_common_options(parser)
    return parser


def _dispatch(words: list[str]) -> int:
    at = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    before = main_parser().parse_args(words[:at])
    if before.version:
        output.write(f"moesaic {__version__}\n")
        return 0
    if at == len(words):
        output.write(main_parser().format_help())
        return 0
    verb = words[at]
    if verb not in VERBS:
        raise unknown_name("verb", verb, list(VERBS))
    module = importlib.import_module(f"moesaic.cli.{verb}")
    args = verb_parser(verb).parse_args(words[at + 1 :], namespace=before)
    if args.verbose:
        _say_backend()
    return module.run(args)


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    everywhere = parser.add_argument_group("everywhere")
    for name, text in (
        ("--debug", "show the traceback of an error"),
        ("--verbose", "say which kernels were chosen"),
    ):
        # No default after the verb, where it would undo what stood before it.
        default = False if parser.prog == "moesaic" else argparse.SUPPRESS
        everywhere.add_argument(name, action="store_true", default=default, help=text)


def _say_backend() -> None:
    from moesaic.kernels import backend

    output.talk(f"kernels: {backend.describe()}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _explain_os_error(error: OSError) -> str:
    name = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
    hint = next((hint for kind, hint in _HINTS.items() if isinstance(error, kind)), "")
    if error.errno in _NO_ROOM:
        hint = "; free space or write elsewhere"
    return f"{error.strerror or _one_line(error)}{name}{hint}"


def _forget_stdout() -> None:
    """Point stdout nowhere, so that Python's own flush at exit does not complain a second time."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stdout without a file behind it needs nothing
        return
