"""`moesaic chat`: a conversation in the terminal, with any model that has a chat template or with the embedded one."""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

from moesaic.cli import output
from moesaic.cli.conversation import Conversation
from moesaic.cli.text import (
    Writer,
    add_text_arguments,
    check_sampling,
    decode_utf8,
    keep_quiet,
    open_writer,
)
from moesaic.errors import ConfigError, GenerationError

DEFAULT_MODEL_BITS = 8
HELP = "/reset starts over, /system TEXT starts over with a system message, /exit or Ctrl-D leaves"


class _Chosen(NamedTuple):
    """The model to talk to, what to call it, and where it comes from if that needs saying."""

    writer: Writer
    name: str
    origin: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic chat`."""
    parser.epilog = 'example: moesaic chat --prompt "What is the capital of France?"'
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a checkpoint folder or a .gguf file (the embedded model if not given)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this once and leave")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    # Greedy: drawn from the whole distribution, the small 4-bit default model often wanders off its first word.
    add_text_arguments(parser, max_new_tokens=256, temperature=0.0)


def run(args: argparse.Namespace) -> int:
    """Answer one prompt, or talk until the user leaves. Returns the exit code."""
    check_sampling(args)
    if args.json and args.prompt is None:
        raise ConfigError("--json prints one answer; give --prompt TEXT with it")
    chosen = _choose(args)
    config = chosen.writer.model.config
    counts = f"{output.number(config.total)} parameters, {output.number(config.active_all)} active per token"
    output.talk(f"{chosen.name}: {counts}{chosen.origin}")
    conversation = Conversation(chosen.writer, args, _say_forgotten, args.system)
    if args.prompt is not None:
        return _answer_once(conversation, args, chosen.name)
    try:
        return _talk(conversation)
    except KeyboardInterrupt:  # leaving this way is no failure here
        output.talk("")
        return 0


def _choose(args: argparse.Namespace) -> _Chosen:
    if args.model is not None:
        return _Chosen(open_writer(args.model, args, decoder_for="chat"), args.model, "")
    from moesaic.tune.upcycle import read_record, smollm2_moe

    with output.progress("finding the default model (made at first use)"):
        folder = smollm2_moe()
    difference = read_record(folder)["max_logit_difference"]
    origin = (
        f"; an MoE made from the dense SmolLM2-135M-Instruct, whose logits differ by {difference:.1e} of their scale"
    )
    if args.bits is None and args.dtype is None:  # what it was made from has 4 to 8 bits
        args.bits = DEFAULT_MODEL_BITS
        origin += f"; in {args.bits} bits here (--dtype fp32 keeps every digit)"
    return _Chosen(open_writer(str(folder), args), "smollm2-moe", origin)


def _answer_once(conversation: Conversation, args: argparse.Namespace, name: str) -> int:
    written = conversation.ask(args.prompt, keep_quiet if args.json else output.write)
    if args.json:
        output.print_json({"model": name, "system": args.system, "prompt": args.prompt, **written.to_dict()})
    else:
        output.write("\n")
    output.talk(written.summary())
    return 0


def _talk(conversation: Conversation) -> int:
    """Answer turn after turn; 2 when one of them failed."""
    exit_code = 0
    for line in _turns():
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset(conversation.system)
            output.talk("the conversation starts over")
        elif line == "/system" or line.startswith("/system "):
            conversation.reset(line.removeprefix("/system").strip() or None)
            output.talk("the conversation starts over with this system message")
        elif line.startswith("/"):
            output.talk(f"unknown command {line.split()[0]}; {HELP}")
        else:
            try:
                written = conversation.ask(line, output.write)
            except GenerationError as error:  # one turn that is too long must not end the conversation
                output.talk(f"moesaic: error: {error}")
                exit_code = 2
                continue
            output.write("\n")
            output.talk(f"({written.summary()})")
    return exit_code


def _turns() -> Iterator[str]:
    """Lines that say something: from the terminal with line editing, or from a pipe."""
    if not sys.stdin.isatty():
        for data in sys.stdin.buffer:
            if line := decode_utf8(data, "standard input").strip():
                yield line
        return
    _edit_lines()
    output.talk(HELP)
    while True:
        try:
            line = _ask_terminal()
        except EOFError:
            output.talk("")
            return
        if line:
            yield line


def _ask_terminal() -> str:
    if sys.stdout.isatty():
        return input("> ").strip()
    output.write("> ", sys.stderr)  # answers go to a file: keep the prompt out of it
    return input().strip()


def _edit_lines() -> None:
    """Arrow keys and history in input(), where Python was built with them."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")


def _say_forgotten(num_turns: int) -> None:
    what = "the oldest turn is" if num_turns == 1 else f"the {num_turns} oldest turns are"
    output.talk(f"({what} forgotten: the conversation has outgrown the context)")
