"""Writes docs/cli.md from the parsers: `python -m moesaic.cli.reference > docs/cli.md`.

It reads the options rather than the help text, whose layout changes with the terminal and the version of Python.
"""

import argparse
import sys
from collections.abc import Iterator

from moesaic.cli.main import EXAMPLE, VERBS, main_parser, verb_parser

COMMAND = "python -m moesaic.cli.reference > docs/cli.md"


def reference() -> str:
    """The whole page, Markdown."""
    parts = [
        "# Command line",
        f"<!-- Written by `{COMMAND}`; do not edit. -->",
        "Data goes to stdout, talk to stderr. Exit codes: 0 done, 1 a bug of moesaic, 2 something to put right, "
        "130 interrupted.",
        "\n".join(f"- [`moesaic {verb}`](#moesaic-{verb}): {summary}" for verb, summary in VERBS.items()),
        f"```\n{EXAMPLE.removeprefix('example: ')}\n```",
        _options_table(main_parser()),
    ]
    parts += [_verb_section(verb) for verb in VERBS]
    return "\n\n".join(parts) + "\n"


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """What a parser takes, --help left out."""
    return (action for action in parser._actions if action.dest != "help")


def spelling(action: argparse.Action) -> str:
    """An option as one types it: `--context N`, `MODEL`, `--dtype {fp32,bf16}`."""
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices is not None:
        value = "{" + ",".join(str(choice) for choice in action.choices) + "}"
    if action.nargs in ("?", "*"):  # may be left out
        value = f"[{value}]"
    if not action.option_strings:
        return value
    return action.option_strings[-1] if action.nargs == 0 else f"{action.option_strings[-1]} {value}"


def _verb_section(verb: str) -> str:
    parser = verb_parser(verb)
    example = "\n".join(line.removeprefix("example:").strip() for line in (parser.epilog or "").splitlines())
    return "\n\n".join([f"## moesaic {verb}", f"{parser.description}.", f"```\n{example}\n```", _options_table(parser)])


def _options_table(parser: argparse.ArgumentParser) -> str:
    rows = [f"| `{_escape(spelling(action))}` | {_escape(_help(action))} |" for action in options(parser)]
    return "\n".join(["| option | what it does |", "|---|---|", *rows])


def _help(action: argparse.Action) -> str:
    return (action.help or "") % {"default": action.default}


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
