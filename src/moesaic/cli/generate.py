"""`moesaic generate`: continues a prompt, or writes the target of a source, text to stdout as it comes."""

import argparse
import sys
from pathlib import Path

from moesaic.cli import output
from moesaic.cli.text import (
    Writer,
    add_text_arguments,
    check_sampling,
    decode_utf8,
    keep_quiet,
    open_writer,
    write_on,
)
from moesaic.errors import ConfigError, GenerationError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic generate`."""
    parser.epilog = 'example: moesaic generate runs/demo/moe --prompt "In the beginning" --max-new-tokens 50'
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a .gguf file")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the text to continue (standard input if not given)")
    source.add_argument(
        "--prompt-file", metavar="FILE", help="a UTF-8 file with the text; one last line end is dropped"
    )
    parser.add_argument(
        "--target-prefix",
        metavar="TEXT",
        help="what the target begins with, for a model with an encoder: the token of a language, say",
    )
    add_text_arguments(parser, max_new_tokens=128, temperature=0.0)


def run(args: argparse.Namespace) -> int:
    """Continue a prompt, or write its target, and say how fast. Returns the exit code."""
    check_sampling(args)
    prompt = _read_prompt(args)
    writer = open_writer(args.model, args)
    prefix = _target_prefix(writer, args.target_prefix)
    prompt_ids = _source_ids(writer, prompt) if writer.model.config.encoder else _prompt_ids(writer, prompt)
    emit = keep_quiet if args.json else output.write
    written = write_on(writer, prompt_ids, args, emit, target_prefix=prefix)
    if args.json:
        output.print_json({"model": args.model, "prompt": prompt, "prompt_token_ids": prompt_ids, **written.to_dict()})
    else:
        output.write("\n")
    output.talk(written.summary())
    return 0


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is not None:
        return _without_line_end(Path(args.prompt_file).read_bytes(), args.prompt_file)
    if sys.stdin.isatty():
        raise ConfigError("no prompt; give --prompt TEXT or --prompt-file FILE, or pipe text in")
    return _without_line_end(sys.stdin.buffer.read(), "standard input")


def _without_line_end(data: bytes, source: str) -> str:
    return decode_utf8(data, source).removesuffix("\n").removesuffix("\r")


def _prompt_ids(writer: Writer, prompt: str) -> list[int]:
    return writer.tokenizer.encode(prompt, add_special_tokens=True) or _start_ids(writer)


def _source_ids(writer: Writer, prompt: str) -> list[int]:
    """The tokens of a source, with the token that ends it, whether or not the tokenizer puts it there."""
    ids, ends = writer.tokenizer.encode(prompt, add_special_tokens=True), writer.model.config.eos_token_ids
    return ids if not ends or (ids and ids[-1] in ends) else [*ids, ends[0]]


def _target_prefix(writer: Writer, text: str | None) -> list[int]:
    if text is None:
        return []
    if writer.model.config.encoder is None:
        raise ConfigError("--target-prefix with a model that has no encoder; put that text at the end of the prompt")
    return writer.tokenizer.encode(text)


def _start_ids(writer: Writer) -> list[int]:
    """What stands in for an empty prompt: the token that starts a text, or else the one that ended the text before."""
    config = writer.model.config
    start = [id for id in (config.bos_token_id, *config.eos_token_ids) if id is not None]
    if not start:
        raise GenerationError("an empty prompt, and this model has no token that starts a text; give --prompt TEXT")
    return start[:1]
